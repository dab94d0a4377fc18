"""The random generators of a process that belong to devices, and a body that moves none."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import attrs

from peftstate.errors import RestoreError
from peftstate.sections._bit_generators import TWISTER, set_kind

ACCELERATORS = ("cuda", "xpu", "mps", "npu")
"""Kinds of device whose generators are recorded, as torch names their modules."""


def devices() -> dict[str, tuple[ModuleType, int]]:
    """Each accelerator of this process, with torch's module for it and its index."""
    import torch

    found: dict[str, tuple[ModuleType, int]] = {}
    for kind in ACCELERATORS:
        backend = getattr(torch, kind, None)
        if backend is None or not hasattr(backend, "get_rng_state"):
            continue
        if not getattr(backend, "is_available", lambda: True)():
            continue
        for index in range(backend.device_count()):
            found[f"{kind}:{index}"] = (backend, index)
    return found


@attrs.frozen(kw_only=True)
class Standing:
    """Where all generators of this process stand, of whatever kind they are.

    Nothing of it can be written down; it is to put them back where they were.

    Attributes:
        python: The state of `random`.
        numpy: numpy's global generator, and its state.
        torch_cpu: The state of torch on the CPU.
        accelerators: Each device's module in torch, its index and its state.
    """

    python: Any
    numpy: tuple[Any, Any]
    torch_cpu: Any
    accelerators: tuple[tuple[ModuleType, int, Any], ...]

    @classmethod
    def now(cls) -> Standing:
        """Look, without drawing a number."""
        import numpy as np
        import torch

        return cls(
            python=random.getstate(),
            numpy=(np.random.mtrand.get_bit_generator(), np.random.get_state(legacy=False)),
            torch_cpu=torch.get_rng_state(),
            accelerators=tuple(
                (backend, index, backend.get_rng_state(index))
                for backend, index in devices().values()
            ),
        )

    def put_back(self) -> None:
        """Put all of them back; one that cannot be is no reason to leave the others.

        Raises:
            RestoreError: A generator refused its own state.
        """
        import torch

        steps: list[Callable[[], object]] = [
            lambda: random.setstate(self.python),
            self._put_back_numpy,
            lambda: torch.set_rng_state(self.torch_cpu),
        ]
        for backend, index, state in self.accelerators:
            steps.append(functools.partial(backend.set_rng_state, state, index))
        failed: Exception | None = None
        for step in steps:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - raised below
                failed = failed or error
        if failed is not None:
            reason = f"{type(failed).__name__}: {failed}"
            raise RestoreError("rng", f"a generator could not be put back ({reason})") from failed

    def _put_back_numpy(self) -> None:
        """Put numpy's global generator back, the object itself if it is another one now."""
        import numpy as np

        generator, state = self.numpy
        if np.random.mtrand.get_bit_generator() is not generator:
            np.random.mtrand.set_bit_generator(generator)
        np.random.set_state(state)


def seed_all(seed: int) -> None:
    """Seed every generator that this process has; numpy's becomes one that can be seeded."""
    import numpy as np
    import torch

    set_kind(TWISTER)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more
    torch.manual_seed(seed)


@contextmanager
def kept(*, seed: int | None = None) -> Iterator[None]:
    """Have every generator where it was when the body ends, which begins with a seed if given."""
    standing = Standing.now()
    try:
        if seed is not None:
            seed_all(seed)
        yield
    finally:
        standing.put_back()
