"""Times of work that is done over and over, by two or more in turn."""

from __future__ import annotations

import gc
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

import attrs

from benchmarks._page import ROOT

T = TypeVar("T")


@attrs.frozen
class Sample:
    """What one run took.

    Attributes:
        wall: Seconds from its begin to its end.
        cpu: Seconds that the CPU worked for it, all threads together. Other programs on the
            machine disturb it less.
    """

    wall: float
    cpu: float


@attrs.frozen
class Comparison:
    """The runs of peftstate, each beside the run of something else just before it.

    Attributes:
        other: The runs of what peftstate is compared with.
        ours: The runs of peftstate, as many.
    """

    other: tuple[Sample, ...]
    ours: tuple[Sample, ...]

    @property
    def wall_ratio(self) -> float:
        """The median, over the pairs of runs, of our time over the other one's."""
        return _ratio([(ours.wall, other.wall) for ours, other in self._pairs()])

    @property
    def cpu_ratio(self) -> float:
        """The same for the time of the CPU."""
        return _ratio([(ours.cpu, other.cpu) for ours, other in self._pairs()])

    def _pairs(self) -> list[tuple[Sample, Sample]]:
        """Our runs, each with the other one."""
        return list(zip(self.ours, self.other, strict=True))


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of the ratios."""
    return median(ours / other for ours, other in pairs)


def wall(samples: Sequence[Sample]) -> float:
    """The median of the times, in seconds."""
    return median(sample.wall for sample in samples)


def timed(work: Callable[[], T]) -> tuple[T, Sample]:
    """Do some work, and say how long it took."""
    gc.collect()
    before = time.perf_counter(), time.process_time()
    result = work()
    return result, Sample(time.perf_counter() - before[0], time.process_time() - before[1])


def timed_process(command: Sequence[str]) -> Sample:
    """Run a program, whose output is dropped, and say how long it took.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    before = time.perf_counter(), _cpu_of_children()
    subprocess.run(  # noqa: S603
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
    )
    return Sample(time.perf_counter() - before[0], _cpu_of_children() - before[1])


def _cpu_of_children() -> float:
    """Seconds that the CPU worked for processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def alternately(runs: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, tuple[T, ...]]:
    """Do several kinds of runs in turn, A B A B.

    Args:
        runs: What to run, by name, in this order. The first round of all warms up, and is dropped.
        repetitions: How many rounds count.

    Returns:
        What the runs gave, by name.
    """
    rounds = [{name: run() for name, run in runs.items()} for _ in range(repetitions + 1)]
    return {name: tuple(found[name] for found in rounds[1:]) for name in runs}
