"""The steps of a load and of a comparison, each over all sections that are handled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._diff import Mismatch
from peftstate._diff import steps as path_steps
from peftstate._policy import Policy
from peftstate._report import Report
from peftstate.errors import PeftStateError, RestoreError
from peftstate.sections import SECTIONS
from peftstate.sections._tensors import sidecar_tensors

if TYPE_CHECKING:
    from peftstate.manifest import Manifest
    from peftstate.sections._base import Section
    from peftstate.sections._view import ModelView

LOCK = threading.RLock()
"""Held by every load of ours: transformers sets the default dtype of the whole process while it
loads, and PEFT's registries are plain dictionaries."""
_PATIENCE = 60.0
"""Seconds that a save waits for loads: for many to take their turns, not for one that hangs."""


@contextmanager
def unless_busy() -> Iterator[None]:
    """Keep loads of other threads out while a model is saved, unless one takes too long.

    Nothing can keep a save from being made for ever: it may be what a signal handler does before
    the process has to end.
    """
    held = False
    try:
        held = LOCK.acquire(timeout=_PATIENCE)
        yield
    finally:
        if held:
            LOCK.release()


@attrs.frozen(kw_only=True)
class Plan:
    """Which sections a load restores and compares, and what it does about differences.

    Attributes:
        policy: What `on_mismatch` says.
        skipped: Names of the sections that are left alone.
    """

    policy: Policy
    skipped: frozenset[str] = frozenset()

    def sections(self, view: ModelView, manifest: Manifest) -> tuple[Section[Any], ...]:
        """The sections that are handled, in order."""
        return tuple(
            section
            for section in SECTIONS
            if section.name in manifest.sections
            and section.name not in self.skipped
            and section.is_known(manifest.sections[section.name])
            and self.policy.handles(section.name)
            and section.applies_to(view)
        )


def check_base(view: ModelView, manifest: Manifest, plan: Plan) -> None:
    """Compare the base model with the saved one, before it is touched.

    A section that differs ends it: weights that are quantized in another way are other weights.

    Raises:
        StateMismatchError: It is another one, or quantized in another way.
    """
    view = view.once()
    for section in plan.sections(view, manifest):
        if section.checked_on_base:
            mismatches = tuple(
                mismatch
                for mismatch in _compare(section, section.capture_like, view, manifest)
                if not section.restored & set(path_steps(mismatch.field))
            )
            plan.policy.apply(Report(mismatches, (section.name,)))


def _compare(
    section: Section[Any],
    capture: Callable[[ModelView, Any], Any],
    view: ModelView,
    manifest: Manifest,
) -> tuple[Mismatch, ...]:
    """The differences between a record and the model."""
    saved = manifest.sections[section.name]
    with _handling(section, _NOT_COMPARED):
        return section.compare(saved, capture(view, saved))


def prepare_base(view: ModelView, manifest: Manifest, plan: Plan) -> None:
    """Bring the bare base model into the saved state.

    What it needs memory for must be in the files that were read: a number in a manifest is no
    reason to make a model larger.
    """
    shapes = {tuple(tensor.shape) for tensor in sidecar_tensors(manifest.sections)}
    for adapter in manifest.sections["adapters"].adapters.values():
        shapes |= {tuple(tensor.shape) for tensor in adapter.tensors.values()}
    view = attrs.evolve(view.once(), saved_shapes=frozenset(shapes))
    for section in plan.sections(view, manifest):
        if section.prepare is not None:
            with _handling(section, _NOT_SET):
                section.prepare(manifest.sections[section.name], view)


def restore_sections(view: ModelView, manifest: Manifest, plan: Plan) -> None:
    """Bring the wrapped model into the saved state."""
    view = view.once()
    sections = plan.sections(view, manifest)
    steps = [(section, section.restore) for section in sections]
    steps += [(section, section.finish) for section in sections]
    for section, step in steps:
        if step is not None:
            with _handling(section, _NOT_SET):
                step(manifest.sections[section.name], view)


@contextmanager
def _handling(section: Section[Any], failure: str) -> Iterator[None]:
    """Say which section it was that failed, whatever a library raised over it."""
    try:
        yield
    except PeftStateError:
        raise
    except Exception as error:
        message = f"{failure} ({type(error).__name__}: {error})"
        raise RestoreError(section.name, message) from error


_NOT_SET = "the saved state could not be set"
_NOT_COMPARED = "the model could not be compared with the saved state"


def compare_restored(view: ModelView, manifest: Manifest, plan: Plan) -> Report:
    """Compare what was restored with what was saved.

    Args:
        view: The model. If it walks over it once, whatever put other modules into the model since
            has called `view.changed()`; for other tensors, it looks again.
        manifest: What was saved.
        plan: Which sections are compared.

    Returns:
        What differs, which the policy has made a warning or nothing.

    Raises:
        StateMismatchError: Something is not as it was saved.
    """
    view.tensors_changed()
    report = compare(view, manifest, plan, lambda section: section.capture_restored)
    plan.policy.apply(report)
    return report


def compare(
    view: ModelView,
    manifest: Manifest,
    plan: Plan,
    capture: Callable[[Section[Any]], Callable[[ModelView, Any], Any]],
) -> Report:
    """Compare the sections of a plan."""
    view = view.once()
    sections = plan.sections(view, manifest)
    with ExitStack() as stack:
        for section in sections:
            if section.read_ahead is not None:
                with _handling(section, _NOT_COMPARED):
                    stack.enter_context(section.read_ahead(view, manifest.sections[section.name]))
        mismatches = [
            mismatch
            for section in sections
            for mismatch in _compare(section, capture(section), view, manifest)
        ]
    return Report(tuple(mismatches), tuple(section.name for section in sections))
