"""How the cost of a load grows: with the adapter, the base model, and what else there is.

The loads are onto base models that were not read before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs

import peftstate
from benchmarks._generations import silently
from benchmarks.fidelity._libraries import PEFT, PEFTSTATE
from benchmarks.performance import _live
from benchmarks.performance._measure import Comparison, Sample, alternately, timed
from benchmarks.performance._workloads import (
    MEDIUM,
    MEGABYTE,
    TINY,
    Bench,
    Workload,
    bare,
    check_loaded,
    llama,
    lora,
)
from peftstate.sections import _remembered

RANKS = (4, 8, 16, 32, 64, 128, 256)
WIDTHS = (2560, 5120, 10240, 20480, 40960)
"""Of the base model's layers that have no adapter, which makes a model of 2 GB at last."""
ADAPTERS = (1, 2, 4, 8, 16)


@attrs.frozen(kw_only=True)
class Growth:
    """Loads of something that grows.

    Attributes:
        against: What grows.
        points: How large it is, and the runs.
    """

    against: str
    points: tuple[tuple[float, Comparison], ...]


def with_adapter(folder: Path, repetitions: int, ranks: Sequence[int] = RANKS) -> Growth:
    """Adapters of growing rank on one base model."""

    def points() -> Iterator[tuple[float, Comparison]]:
        for rank in ranks:
            bench = _bench(MEDIUM, folder / f"rank-{rank}", config=lora(rank))
            yield bench.adapter_bytes / MEGABYTE, _live.first_load(bench, repetitions)

    return Growth(against="size of the adapter, MB", points=tuple(points()))


def with_base(folder: Path, repetitions: int, widths: Sequence[int] = WIDTHS) -> Growth:
    """One adapter on base models of growing size."""
    config = lora(16, target_modules=["q_proj", "v_proj"])

    def points() -> Iterator[tuple[float, Comparison]]:
        for width in widths:
            make = partial(llama, hidden=1024, layers=8, intermediate=width, vocab=4096)
            bench = _bench(MEDIUM, folder / f"width-{width}", make=make, config=config)
            yield bench.base_bytes / MEGABYTE, _live.first_load(bench, repetitions)

    return Growth(against="size of the base model, MB", points=tuple(points()))


def with_adapters(folder: Path, repetitions: int, counts: Sequence[int] = ADAPTERS) -> Growth:
    """A growing number of adapters in one folder."""

    def points() -> Iterator[tuple[float, Comparison]]:
        for count in counts:
            place = folder / f"adapters-{count}"
            base = _saved_together(TINY, count, place)
            yield count, _load_together(base, count, place, repetitions)

    return Growth(against="adapters in the folder", points=tuple(points()))


def with_sections(folder: Path, repetitions: int, counts: Sequence[int] | None = None) -> Growth:
    """A growing number of sections, in their order; the others are ignored."""
    bench = _bench(TINY, folder / "sections")
    names = list(peftstate.read_manifest(bench.adapter).sections)

    def points() -> Iterator[tuple[float, Comparison]]:
        for count in range(len(names) + 1) if counts is None else counts:
            ignored = dict.fromkeys(names[count:], "ignore")
            runs = {
                PEFT.name: partial(bench.first_load, PEFT),
                PEFTSTATE.name: partial(bench.first_load, PEFTSTATE, on_mismatch=ignored),
            }
            found = alternately(runs, repetitions)
            yield count, Comparison(found[PEFT.name], found[PEFTSTATE.name])

    return Growth(against="sections that are restored", points=tuple(points()))


def _bench(workload: Workload, folder: Path, **changes: Any) -> Bench:
    """A workload that is changed in some respect."""
    return Bench.make(attrs.evolve(workload, **changes), folder)


def _saved_together(workload: Workload, count: int, folder: Path) -> Any:
    """Save some adapters in one folder, and give the bare base model."""
    with silently():
        model = peftstate.get_peft_model(workload.make(), workload.config)
        for number in range(1, count):
            model.add_adapter(_name(number), workload.config)
        model.eval().save_pretrained(folder)
    return bare(model)


def _load_together(base: Any, count: int, folder: Path, repetitions: int) -> Comparison:
    """Load all adapters of a folder; plain PEFT has to be told each one."""

    def with_peft() -> Any:
        model = PEFT.load(base, folder)
        for number in range(1, count):
            model.load_adapter(str(folder / _name(number)), _name(number))
        return model

    def run(load: Callable[[], Any]) -> Sample:
        nonlocal base
        _remembered.forget()
        with silently():
            model, sample = timed(load)
        for number in range(1, count):
            check_loaded(model, folder / _name(number), _name(number))
        base = bare(model)
        return sample

    runs = {
        PEFT.name: lambda: run(with_peft),
        PEFTSTATE.name: lambda: run(lambda: PEFTSTATE.load(base, folder, is_trainable=False)),
    }
    found = alternately(runs, repetitions)
    return Comparison(found[PEFT.name], found[PEFTSTATE.name])


def _name(number: int) -> str:
    """The name of a further adapter."""
    return f"adapter-{number}"
