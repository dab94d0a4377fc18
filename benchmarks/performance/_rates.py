"""How fast this machine reads, digests and hashes: what no check of every byte can beat."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import attrs
import numpy as np
from blake3 import blake3

from benchmarks.performance._measure import timed

SIZE = 2**29
"""Bytes that are read: more than any cache of a CPU holds."""
_CHUNK = 2**24


@attrs.frozen(kw_only=True)
class Rates:
    """Rates in bytes per second.

    Attributes:
        memory: Memory, read by all cores.
        blake3: BLAKE3, of all cores.
        blake3_of_one: BLAKE3, of one core.
        sha256: SHA-256, of one core.
    """

    memory: float
    blake3: float
    blake3_of_one: float
    sha256: float


def measure(repetitions: int, size: int = SIZE) -> Rates:
    """Measure the rates in turn.

    Args:
        repetitions: How many runs of each count.
        size: Bytes that are read in each.
    """
    data = np.full(size // 8, 0x5A5A5A5A5A5A5A5A, dtype=np.uint64)
    chunks = np.split(data, max(size // _CHUNK, 1))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work: dict[str, Callable[[], Any]] = {
            "memory": lambda: list(pool.map(np.max, chunks)),
            "blake3": lambda: list(pool.map(_digest, chunks)),
            "blake3_of_one": lambda: [_digest(chunk) for chunk in chunks],
            "sha256": lambda: hashlib.sha256(data.data),
        }
        times = {name: _median(each, repetitions) for name, each in work.items()}
    return Rates(**{name: size / seconds for name, seconds in times.items()})


def _digest(chunk: Any) -> bytes:
    """The BLAKE3 digest of an array."""
    return blake3(chunk.view(np.uint8).data).digest()


def _median(work: Callable[[], Any], repetitions: int) -> float:
    """The median time of some work, after one run to warm up."""
    samples: Sequence[float] = [timed(work)[1].wall for _ in range(repetitions + 1)][1:]
    return median(samples)
