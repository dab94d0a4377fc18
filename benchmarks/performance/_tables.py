"""The tables of the page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from benchmarks._page import Table
from benchmarks.fidelity._libraries import PEFT, PEFTSTATE
from benchmarks.performance import profile
from benchmarks.performance._measure import wall
from benchmarks.performance._memory import ADAPTERS, Peak
from benchmarks.performance._results import Memory, Profile, Results, Timing

_MILLION, _BILLION = 10**6, 10**9
_BF16 = 2
"""Bytes of a weight."""
LARGE_MODELS = {
    "Llama 3.1 70B": 70_553_706_496,
    "Llama 3.1 405B": 405_853_388_800,
}
"""Numbers of weights."""
_PROCESSES = 8


def tables(results: Results) -> list[Table]:
    """All tables of a run."""
    return [
        _timings(results),
        _rates(results),
        _memory(results),
        *(_steps(results, path) for path in profile.PATHS),
        _large(results),
    ]


def _timings(results: Results) -> Table:
    """What each path takes, beside something else."""
    tree = results.tree
    rows = [_timing_cells(timing) for timing in results.timings]
    title = f"{tree.adapters:,} adapters, {tree.files:,} files of {tree.size / _MILLION:.0f} MB"
    rows.append(
        _timing_cells(
            Timing(
                path="peftstate verify --recursive",
                workload=title,
                against="cat",
                times=tree.times,
            )
        )
    )
    seconds = wall(tree.times.ours)
    return Table(
        name="performance",
        command=results.command,
        columns=["", "with", "beside", "that takes", "peftstate", "ratio", "ratio of CPU time"],
        rows=rows,
        note=(
            f"`verify --recursive` does {tree.size / seconds / _MILLION:,.0f} MB/s and "
            f"{tree.files / seconds:,.0f} files/s. Threads of torch: {results.threads}."
        ),
    )


def _timing_cells(timing: Timing) -> list[str]:
    """A row of times."""
    times = timing.times
    return [
        f"`{timing.path}`",
        timing.workload,
        timing.against if timing.against == PEFT.name else f"`{timing.against}`",
        _milliseconds(wall(times.other)),
        _milliseconds(wall(times.ours)),
        f"**{_ratio(times.wall_ratio)}**",
        _ratio(times.cpu_ratio),
    ]


def _milliseconds(seconds: float) -> str:
    """A time."""
    return f"{1e3 * seconds:,.1f} ms"


def _ratio(value: float) -> str:
    """A ratio, in three digits."""
    return f"{value:#.3g}"


def _rates(results: Results) -> Table:
    """The limits of the machine."""
    rates = results.rates
    rows: list[tuple[str, float]] = [
        (f"memory, read by {os.cpu_count()} cores", rates.memory),
        (f"BLAKE3, {os.cpu_count()} cores", rates.blake3),
        ("BLAKE3, one core", rates.blake3_of_one),
        ("SHA-256, one core", rates.sha256),
    ]
    return Table(
        name="performance-rates",
        command=results.command,
        columns=["", "GB/s"],
        rows=[[name, f"{rate / _BILLION:.1f}"] for name, rate in rows],
    )


def _memory(results: Results) -> Table:
    """The memory of each path."""
    return Table(
        name="performance-memory",
        command=results.command,
        columns=["", "with", PEFT.name, PEFTSTATE.name, "ratio", "ratio of the whole process"],
        rows=[_memory_cells(memory) for memory in results.memory],
    )


def _memory_cells(memory: Memory) -> list[str]:
    """A row of sizes."""
    many = memory.path == "adapters"
    number = ADAPTERS if many else 1

    def shown(peak: Peak) -> str:
        return f"{peak.increase / number / _MILLION:,.{2 if many else 0}f} MB"

    return [
        "`load_adapter`, each" if many else memory.path,
        memory.workload,
        shown(memory.peft),
        shown(memory.ours),
        f"**{memory.ours.increase / memory.peft.increase:.2f}**",
        f"{memory.ours.peak / memory.peft.peak:.2f}",
    ]


def _steps(results: Results, path: str) -> Table:
    """The steps of one path, a column for each workload."""
    steps = [each.steps[path] for each in results.profiles]
    names = list(dict.fromkeys(name for each in steps for name in each))
    names.sort(key=profile.REST.__eq__)
    rows = [[name, *(_milliseconds_or_none(each.get(name)) for each in steps)] for name in names]
    limits = [list(_limits(results, each, path)) for each in results.profiles]
    return Table(
        name=f"performance-{path}",
        command=results.command,
        columns=["milliseconds", *(each.workload for each in results.profiles)],
        rows=[
            *rows,
            ["**together**", *(f"{1e3 * sum(each.values()):.1f}" for each in steps)],
            ["limit: all bytes once, at the rate of BLAKE3", *(each[0] for each in limits)],
            ["limit: all bytes once, at the rate of memory", *(each[1] for each in limits)],
        ],
    )


def _milliseconds_or_none(seconds: float | None) -> str:
    """A cell of a step."""
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def _limits(results: Results, found: Profile, path: str) -> Iterator[str]:
    """What no check of every byte can beat: the base model's, but for a further adapter."""
    size = found.adapter_bytes + (0 if path == "load_adapter" else found.base_bytes)
    for rate in (results.rates.blake3, results.rates.memory):
        yield f"{1e3 * size / rate:.1f}"


def _large(results: Results) -> Table:
    """What the full digest of large base models takes, computed from the rates."""
    rates = results.rates

    def cells(name: str, size: int) -> Sequence[str]:
        return [
            name,
            f"{size / _BILLION:.0f} GB",
            f"{size / rates.blake3_of_one:.0f} s",
            f"{size / rates.blake3:.0f} s",
            f"{size / rates.blake3 / _PROCESSES:.1f} s",
        ]

    return Table(
        name="performance-large",
        command=results.command,
        columns=[
            "computed, not measured",
            "bf16",
            "one core",
            f"{os.cpu_count()} cores",
            f"{_PROCESSES} machines like this, an eighth each",
        ],
        rows=[cells(name, _BF16 * weights) for name, weights in LARGE_MODELS.items()],
    )
