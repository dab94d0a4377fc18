"""The same work many times, by several threads, for what lets go of Python's lock meanwhile.

Reading files does, and so do BLAKE3, XXH3 and torch.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import attrs

J = TypeVar("J")
R = TypeVar("R")

WORTH_A_THREAD = 4 * 1024 * 1024
"""Bytes; BLAKE3 takes half a millisecond for them, about as long as a thread takes to start."""


def _ignored(_: int) -> None:
    """What is told how far a thread is that nobody waits for."""


@attrs.frozen
class Work(Generic[J, R]):
    """Work that other threads have begun, and that this one takes a hand in once it waits."""

    _work: Callable[[J], R]
    _todo: deque[tuple[int, J]]
    _done: dict[int, R]
    _others: list[Future[None]]
    _pool: ThreadPoolExecutor | None

    @classmethod
    def begun(
        cls, jobs: Iterable[J], work: Callable[[J], R], *, nbytes: int = WORTH_A_THREAD
    ) -> Work[J, R]:
        """Begin, with a thread for each core but the one that this thread has.

        Args:
            jobs: What there is to work on.
            work: What is done with each.
            nbytes: Bytes that there are to read; few are left to this thread.
        """
        todo = deque(enumerate(jobs))
        cores = usable_cores() if nbytes >= WORTH_A_THREAD else 1
        others = min(cores - 1, _MOST_THREADS, len(todo))
        pool = ThreadPoolExecutor(others, thread_name_prefix="peftstate") if others else None
        begun = cls(work, todo, {}, [], pool)
        if pool is not None:
            with suppress(RuntimeError):  # no thread can be started; the one that waits does it all
                for _ in range(others):
                    begun._others.append(pool.submit(begun._run, _ignored))
        return begun

    def results(self, reach: Callable[[int], object] = _ignored) -> list[R]:
        """What the work gave, in the order of the jobs, once all are done.

        Args:
            reach: Told by this thread how many are done.
        """
        self._run(reach)
        for other in self._others:
            other.result()
        reach(len(self._done))
        return [self._done[index] for index in range(len(self._done))]

    def end(self) -> None:
        """Leave undone what was not begun, and wait for what was."""
        self._todo.clear()
        if self._pool is not None:
            self._pool.shutdown()

    def _run(self, reach: Callable[[int], object]) -> None:
        """Do what is left to do."""
        while True:
            try:
                index, job = self._todo.popleft()
            except IndexError:
                return
            self._done[index] = self._work(job)
            reach(len(self._done))


_MOST_THREADS = 15
"""With this one, and at the 7 GB/s that BLAKE3 reads on one core, as fast as most memory."""


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def switching_often() -> Iterator[None]:
    """Have threads that want Python's lock wait for it a tenth of a millisecond.

    Otherwise, after each step of their work, they would wait for 5 ms for a thread that runs Python
    all the time (`sys.getswitchinterval`), which is longer than the work.
    """
    usual = sys.getswitchinterval()
    try:
        sys.setswitchinterval(min(usual, _SWITCH_INTERVAL))
        yield
    finally:
        sys.setswitchinterval(usual)


_SWITCH_INTERVAL = 1e-4
"""Seconds; switching takes a tenth of that."""


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """Have Python look for cycles of garbage less often, as what makes many objects that stay asks.

    A load makes tens of thousands, and hardly a cycle. By default they would be looked at after
    every 700 (`gc.set_threshold`), while the other cores read the memory past the same caches.
    """
    usual = gc.get_threshold()
    try:
        if usual[0]:  # 0 is never
            gc.set_threshold(max(usual[0], _OBJECTS_BEFORE_COLLECTION), *usual[1:])
        yield
    finally:
        gc.set_threshold(*usual)


_OBJECTS_BEFORE_COLLECTION = 100_000
"""More than LoRA on 300 layers makes; it bounds what other threads leave as garbage meanwhile."""


def in_threads(
    jobs: Iterable[J],
    work: Callable[[J], R],
    reach: Callable[[int], object] = _ignored,
    *,
    nbytes: int = WORTH_A_THREAD,
) -> list[R]:
    """Do the same work many times, and wait for it.

    Args:
        jobs: What there is to work on.
        work: What is done with each.
        reach: Told by this thread how many are done.
        nbytes: As in `Work.begun`.
    """
    begun = Work.begun(jobs, work, nbytes=nbytes)
    try:
        return begun.results(reach)
    finally:
        begun.end()
