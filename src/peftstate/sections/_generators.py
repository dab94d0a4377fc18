"""The random generators of a process that belong to devices, and a body that moves none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

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


def seed_all(seed: int) -> None:
    """Seed every generator that this process has."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more
    torch.manual_seed(seed)


@contextmanager
def kept(*, seed: int) -> Iterator[None]:
    """Have every generator seeded in the body, and where it was when that ends."""
    import numpy as np
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    accelerators = [
        (backend, index, backend.get_rng_state(index)) for backend, index in devices().values()
    ]
    try:
        seed_all(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for backend, index, state in accelerators:
            backend.set_rng_state(state, index)
