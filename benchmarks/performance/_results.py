"""What a run of the benchmark found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import cattrs

from benchmarks.performance._growth import Growth
from benchmarks.performance._measure import Comparison
from benchmarks.performance._memory import Peak
from benchmarks.performance._processes import Tree
from benchmarks.performance._rates import Rates


@attrs.frozen(kw_only=True)
class Timing:
    """One path on one workload.

    Attributes:
        path: What was done, such as ``"from_pretrained"``.
        workload: With what, as a table calls it.
        against: What peftstate is compared with.
        times: The runs.
    """

    path: str
    workload: str
    against: str
    times: Comparison


@attrs.frozen(kw_only=True)
class Memory:
    """The memory of one path on one workload.

    Attributes:
        path: What was done: ``"load"``, ``"save"``, or ``"adapters"`` for many further ones.
        workload: With what, as a table calls it.
        peft: With plain PEFT.
        ours: With peftstate.
    """

    path: str
    workload: str
    peft: Peak
    ours: Peak


@attrs.frozen(kw_only=True)
class Profile:
    """Where the time of one workload goes.

    Attributes:
        workload: The workload, as a table calls it.
        base_bytes: Bytes of the base model in memory.
        adapter_bytes: Bytes of the adapter's file.
        steps: The name of a path → the seconds of its steps, in order.
    """

    workload: str
    base_bytes: int
    adapter_bytes: int
    steps: Mapping[str, Mapping[str, float]]


@attrs.frozen(kw_only=True)
class Results:
    """All that a run found.

    Attributes:
        command: What reproduces it.
        threads: How many threads torch computes with.
        rates: The limits of the machine.
        timings: Each path on each workload.
        tree: The verification of many adapters.
        memory: The memory of loads and saves.
        profiles: The steps of each workload.
        growths: How loads grow.
    """

    command: str
    threads: int
    rates: Rates
    timings: tuple[Timing, ...]
    tree: Tree
    memory: tuple[Memory, ...]
    profiles: tuple[Profile, ...]
    growths: tuple[Growth, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it, each single run included; times in seconds, sizes in bytes."""
        converter = cattrs.Converter()
        plain = converter.gen_unstructure_attrs_fromdict(Comparison)
        converter.register_unstructure_hook(
            Comparison,
            lambda times: {
                **plain(times),
                "wall_ratio": times.wall_ratio,
                "cpu_ratio": times.cpu_ratio,
            },
        )
        found: dict[str, Any] = converter.unstructure(self)
        return found
