"""The comparison of the bare base model with the saved one, before or while it gets its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs

from peftstate._steps import Plan, check_base
from peftstate.errors import RestoreError, StateMismatchError
from peftstate.sections._ahead import Ahead

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
    check_base(view, manifest, plan)
    yield lambda: None


@contextmanager
def base_checked_meanwhile(
    view: ModelView, manifest: Manifest, plan: Plan
) -> Iterator[Callable[[], None]]:
    """Compare the base model, its large tensors while it gets its adapter.

    Whatever fails within: if the base model is not the saved one, that is what is raised. By then
    it has to be as it was before.

    Returns:
        What ends the comparison: to be called before anything writes to the model's tensors.

    Raises:
        StateMismatchError: It is another one, or quantized in another way.
        RestoreError: It changed meanwhile.
    """
    record = manifest.sections["base_model"]
    if record.fingerprint != "full" or not plan.policy.is_strict("base_model"):
        with base_checked(view, manifest, plan) as nothing_left:
            yield nothing_left
        return
    put_back = {*record.changed, *record.shadowed}
    fixed = {name: tensor for name, tensor in record.tensors.items() if name not in put_back}
    ahead = Ahead.of(view, fixed)
    try:
        _check_rest(view, manifest, plan, ahead)
        failure: Exception | None = None
        try:
            yield partial(_end, ahead)
        except Exception as error:  # noqa: BLE001 - it is raised below, or what led to it is
            failure = error
        if failure is not None:
            if not ahead.agrees():
                check_base(view.now(), manifest, plan)
            raise failure
    finally:
        ahead.end()


def _check_rest(view: ModelView, manifest: Manifest, plan: Plan, ahead: Ahead) -> None:
    """Compare what is not compared meanwhile; if it differs, all of it, to name all differences."""
    rest = attrs.evolve(view, digested_elsewhere=frozenset(ahead.saved))
    try:
        check_base(rest, manifest, plan)
    except StateMismatchError:
        check_base(view, manifest, plan)
        raise


def _end(ahead: Ahead) -> None:
    """End the comparison."""
    if not ahead.agrees():
        raise RestoreError("base_model", "the base model changed while its adapter was loaded")
