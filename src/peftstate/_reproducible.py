"""Evaluation that gives the same numbers each time: `reproducible`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import attrs
from torch import nn

from peftstate.sections import _flags, _generators, rng, runtime

if TYPE_CHECKING:
    from peftstate.manifest import Manifest

_ATTRIBUTE = "_peftstate_process"
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""What cuBLAS needs to be deterministic, if it is not in use yet."""


@attrs.frozen(kw_only=True)
class _Process:
    """The state of the process that a model was saved in.

    Attributes:
        rng: The random generators; `None` if nobody knows.
        runtime: The settings.
    """

    rng: rng.RngRecord | None
    runtime: runtime.RuntimeRecord


def keep_process(model: nn.Module, manifest: Manifest) -> None:
    """Have a model carry the state of the process that it was saved in."""
    states, settings = manifest.sections["rng"], manifest.sections["runtime"]
    known = states if rng.SECTION.is_known(states) else None
    setattr(model, _ATTRIBUTE, _Process(rng=known, runtime=settings))


@contextmanager
def reproducible(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Evaluate a model so that each time gives the same numbers and the same sampled text.

    In the body the model is in eval mode, every random generator is seeded, torch computes with
    deterministic algorithms, where it has them, and with the settings that were saved with the
    model. When it ends, also by an exception, train flags, generators and settings are as before.

    Generators and settings belong to the process: do not enter it in two threads at once. An
    operation that has no deterministic algorithm warns, unless an error was asked for before.

    Args:
        model: The model.
        seed: The seed; `None` for the generators' states that were saved with the model.

    Raises:
        ValueError: There is no seed, and no state was saved with the model.
    """
    process: _Process | None = getattr(model, _ATTRIBUTE, None)
    states = None if process is None else process.rng
    if seed is None and states is None:
        why = "was adopted" if process else "was neither loaded nor saved by peftstate"
        raise ValueError(
            f"no random state was saved with this model, which {why}; "
            "pass a seed: peftstate.reproducible(model, seed=0)"
        )
    record = None if process is None else process.runtime
    with ExitStack() as stack:
        stack.enter_context(_variable(*_CUBLAS))
        stack.enter_context(runtime.applied(record, _deterministic(record)))
        stack.callback(_generators.Standing.now().put_back)
        stack.enter_context(_eval_mode(model))
        if seed is not None:
            _generators.seed_all(seed)
        elif states is not None:
            rng.set_states(states)
        yield


def _deterministic(record: runtime.RuntimeRecord | None) -> dict[str, object]:
    """The flags that make torch deterministic; where an error was asked for, it stays one."""
    asked = [_flags.read()] if record is None else [_flags.read(), record.flags]
    strict = any(flags.get(_flags.DETERMINISTIC_ALGORITHMS) == "error" for flags in asked)
    return {
        _flags.DETERMINISTIC_ALGORITHMS: "error" if strict else "warn",
        "cudnn.benchmark": False,
        "cudnn.deterministic": True,
    }


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode, and each module's flag back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable, unless it is set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
