"""The comparison of the bare base model with the saved one, before or while it gets its adapter.

Each load reads all of it. On a live model, a further adapter has it read again only if it looks
different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs

from peftstate._steps import Plan, check_base
from peftstate._work import switching_often
from peftstate.errors import RestoreError, StateMismatchError
from peftstate.sections._ahead import Ahead, large_tensors
from peftstate.sections._base_tensors import base_tensors
from peftstate.sections._seen import Looks

if TYPE_CHECKING:
    from peftstate.manifest import Manifest
    from peftstate.sections._view import ModelView


@contextmanager
def base_checked(view: ModelView, manifest: Manifest, plan: Plan) -> Iterator[Callable[[], None]]:
    """Compare the base model, all of it before it is touched.

    Returns:
        What ends the comparison.

    Raises:
        StateMismatchError: It is another one, or quantized in another way.
    """
    check_base(_remembering(view.once(), manifest), manifest, plan)
    yield lambda: None


def check_base_if_changed(view: ModelView, manifest: Manifest, plan: Plan) -> None:
    """Compare the base model of a live model, but for what was compared before and looks the same.

    Raises:
        StateMismatchError: It is another one, or quantized in another way.
    """
    view = _remembering(view.once(), manifest)
    if view.looks is not None:
        known = view.looks.unchanged(manifest.sections["base_model"].tensors)
        view = attrs.evolve(view, known=known)
    check_base(view, manifest, plan)


def _remembering(view: ModelView, manifest: Manifest) -> ModelView:
    """The view for a comparison that has what it reads remembered, if it reads every byte."""
    if manifest.sections["base_model"].fingerprint != "full":
        return view
    return attrs.evolve(view, looks=Looks.of(base_tensors(view)))


@contextmanager
def base_checked_meanwhile(
    view: ModelView, manifest: Manifest, plan: Plan
) -> Iterator[Callable[[], None]]:
    """Compare the base model, its large tensors while it gets its adapter.

    Whatever fails within: if the base model is not the saved one, that is what is raised. By then
    it has to be as it was before.

    Returns:
        What ends the comparison; it may be called again. Before, nothing may write into the memory
        of the base model, as a merge does, and a forward may do; casts make new tensors.

    Raises:
        StateMismatchError: It is another one, or quantized in another way.
        RestoreError: It changed meanwhile.
    """
    record = manifest.sections["base_model"]
    if record.fingerprint != "full" or not plan.policy.is_strict("base_model"):
        with base_checked(view, manifest, plan) as nothing_left:
            yield nothing_left
        return
    remembering = _remembering(view.once(), manifest)
    changed = {*record.changed, *record.shadowed}
    large = large_tensors(remembering, record.tensors, changed=changed)
    _check_rest(remembering, manifest, plan, large.keys())
    # not before: small operations of torch would wait for a core again and again
    with switching_often():
        ahead = Ahead.begun(remembering, large)
        try:
            yield partial(_end, ahead)
        except Exception:
            if ahead.differs():
                _check_all(view.now(), manifest, plan)
            raise
        finally:
            ahead.end()


def _check_rest(view: ModelView, manifest: Manifest, plan: Plan, large: AbstractSet[str]) -> None:
    """Compare what is not compared meanwhile; if it differs, all of it, to name all differences."""
    rest = attrs.evolve(view, known=frozenset(large))
    try:
        check_base(rest, manifest, plan)
    except StateMismatchError:
        if large:
            _check_all(view, manifest, plan)
        raise


def _check_all(view: ModelView, manifest: Manifest, plan: Plan) -> None:
    """Compare all of the base model, and say nothing of what led to it."""
    try:
        check_base(view, manifest, plan)
    except StateMismatchError as error:
        raise error from None


def _end(ahead: Ahead) -> None:
    """End the comparison."""
    if not ahead.agrees():
        raise RestoreError("base_model", "the base model changed while its adapter was loaded")
