"""The measurements of a run, one after the other."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch

from benchmarks.fidelity._libraries import PEFT
from benchmarks.performance import _growth, _hot, _live, _memory, _processes, _rates, profile
from benchmarks.performance._growth import Growth
from benchmarks.performance._results import Memory, Profile, Results, Timing
from benchmarks.performance._workloads import (
    DEEP,
    GEMMA_BF16,
    GEMMA_NF4,
    LARGE,
    MEDIUM,
    TINY,
    Bench,
    Workload,
)


@attrs.frozen(kw_only=True)
class Extent:
    """How much is measured.

    Attributes:
        command: What is typed for it.
        workloads: What is loaded and saved.
        memory: The paths whose memory is measured, each with one of the workloads.
        repetitions: How many runs count; `None`: as many as the workload says.
        processes: How many runs of processes count.
        profiled: How many runs of a profile, and of each rate, count.
        read: Bytes that are read to measure the rates of the machine.
        live: The numbers of adapters that a further one is loaded beside.
        served: How many runs of that count.
        verified: How many adapters are verified together.
        ranks: Of growing adapters.
        widths: Of growing base models.
        together: Numbers of adapters in one folder.
        sections: Numbers of sections; `None`: from none to all.
        grown: How many runs of each point of a growth count.
    """

    command: str
    workloads: tuple[Workload, ...]
    memory: tuple[tuple[str, Workload], ...]
    repetitions: int | None = None
    processes: int = 7
    profiled: int = 3
    read: int = _rates.SIZE
    live: tuple[int, ...] = _hot.COUNTS
    served: int = 5
    verified: int = 1000
    ranks: tuple[int, ...] = _growth.RANKS
    widths: tuple[int, ...] = _growth.WIDTHS
    together: tuple[int, ...] = _growth.ADAPTERS
    sections: tuple[int, ...] | None = None
    grown: int = 3

    def repeated(self, number: int) -> Extent:
        """The same with as many runs of everything."""
        return attrs.evolve(
            self, repetitions=number, processes=number, profiled=number, served=number, grown=number
        )

    def runs_of(self, workload: Workload) -> int:
        """How many runs of a workload count."""
        return workload.repetitions if self.repetitions is None else self.repetitions


SYNTHETIC = Extent(
    command="make bench",
    workloads=(TINY, DEEP, LARGE),
    memory=(
        *(("load", each) for each in (DEEP, LARGE)),
        *(("save", each) for each in (DEEP, LARGE)),
        ("adapters", TINY),
    ),
)
WITH_GEMMA = Extent(
    command="make bench-gemma",
    workloads=(TINY, GEMMA_BF16, GEMMA_NF4, DEEP, LARGE),
    memory=(
        *(("load", each) for each in (GEMMA_BF16, GEMMA_NF4, DEEP, LARGE)),
        *(("save", each) for each in (GEMMA_BF16, DEEP, LARGE)),
        ("adapters", TINY),
    ),
)
QUICK = Extent(
    command="python -m benchmarks.performance --quick",
    workloads=(TINY,),
    memory=(("load", TINY),),
    repetitions=1,
    processes=1,
    profiled=1,
    read=2**24,
    live=(1, 3),
    served=1,
    verified=2,
    ranks=(4,),
    widths=(256,),
    together=(2,),
    sections=(13,),
    grown=1,
)


def measure(extent: Extent, folder: Path) -> Results:
    """Measure all of it.

    Args:
        extent: How much.
        folder: An empty folder, for models and adapters.
    """
    timings: list[Timing] = []
    profiles: list[Profile] = []
    gc.freeze()  # the libraries, which the collection before each run need not go over
    rates = _rates.measure(extent.profiled, extent.read)
    for workload in extent.workloads:
        _say(workload.title)
        bench = Bench.make(workload, folder / workload.name)
        timings += _of_bench(bench, workload, extent.runs_of(workload))
        profiles.append(_profile(bench, workload, extent.profiled))
        del bench  # before the next one is made
    _say("further adapters")
    timings += _of_server(folder / "hot", extent)
    _say("processes")
    medium = Bench.make(MEDIUM, folder / MEDIUM.name).adapter
    timings += _of_starts(medium, extent.processes)
    tree = _processes.verify_tree(
        folder / "hot" / TINY.name, folder / "tree", extent.verified, min(extent.processes, 5)
    )
    _say("memory")
    memory = [_memory_of(path, workload, folder) for path, workload in extent.memory]
    _say("growth")
    return Results(
        command=extent.command,
        threads=torch.get_num_threads(),
        rates=rates,
        timings=tuple(timings),
        tree=tree,
        memory=tuple(memory),
        profiles=tuple(profiles),
        growths=tuple(_growths(folder, extent)),
    )


def _say(what: str) -> None:
    """Show how far the run is, and for how many seconds the process has been running."""
    print(f"{time.perf_counter() - _STARTED:4.0f} s  {what} …", file=sys.stderr, flush=True)


_STARTED = time.perf_counter()


def _of_bench(bench: Bench, workload: Workload, repetitions: int) -> Iterator[Timing]:
    """Loads of a workload, and half as many saves, each of which takes a load before it."""
    first, again = _live.save(bench, -(-repetitions // 2))
    for path, situation, times in (
        ("from_pretrained", "", _live.first_load(bench, repetitions)),
        ("from_pretrained", ", read before", _live.further_load(bench, repetitions)),
        ("save_pretrained", "", first),
        ("save_pretrained", ", saved twice before, nothing changed", again),
    ):
        title = workload.title + situation
        yield Timing(path=path, workload=title, against=PEFT.name, times=times)


def _profile(bench: Bench, workload: Workload, repetitions: int) -> Profile:
    """Where the time of a workload goes."""
    return Profile(
        workload=workload.title,
        base_bytes=bench.base_bytes,
        adapter_bytes=bench.adapter_bytes,
        steps={
            name: profile.medians(path, bench, repetitions) for name, path in profile.PATHS.items()
        },
    )


def _memory_of(path: str, workload: Workload, folder: Path) -> Memory:
    """The memory of a path on a workload."""
    peft, ours = _memory.measure(path, workload, folder / workload.name)
    return Memory(path=path, workload=workload.title, peft=peft, ours=ours)


def _of_server(folder: Path, extent: Extent) -> Iterator[Timing]:
    """Further adapters on a live model, beside many on a tiny base model and on a real one."""
    for workload in extent.workloads:
        counts = extent.live if workload in (TINY, GEMMA_BF16) else extent.live[:1]
        place = folder / workload.name
        for count, times in _hot.load_adapter(workload, place, extent.served, counts):
            title = f"{workload.title}, beside {count:,}"
            yield Timing(path="load_adapter", workload=title, against=PEFT.name, times=times)


def _of_starts(adapter: Path, repetitions: int) -> Iterator[Timing]:
    """Imports, and the verification of one adapter."""
    runs = _processes.starts(adapter, repetitions)
    size = sum(file.stat().st_size for file in adapter.iterdir())
    for name, workload in (
        (_processes.PYTHON, "the start of Python alone"),
        (_processes.IMPORT, ""),
        (_processes.IMPORT_COMMANDS, "the command line"),
        (_processes.VERIFY, f"an adapter of {size / 1e6:.0f} MB"),
    ):
        times = _processes.against_peft(runs, name)
        yield Timing(path=name, workload=workload, against=_processes.IMPORT_PEFT, times=times)


def _growths(folder: Path, extent: Extent) -> Iterator[Growth]:
    """How loads grow."""
    yield _growth.with_adapter(folder, extent.grown, extent.ranks)
    yield _growth.with_base(folder, extent.grown, extent.widths)
    yield _growth.with_adapters(folder, extent.grown, extent.together)
    yield _growth.with_sections(folder, extent.grown, extent.sections)
