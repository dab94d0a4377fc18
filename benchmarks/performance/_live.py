"""Loads onto a bare base model, and saves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

from benchmarks._generations import silently
from benchmarks.fidelity._libraries import PEFT, PEFTSTATE, Library
from benchmarks.performance._measure import Comparison, Sample, alternately, timed
from benchmarks.performance._workloads import Bench
from peftstate.sections import _remembered

WRITTEN = {
    PEFT.name: {"adapter_config.json", "adapter_model.safetensors"},
    PEFTSTATE.name: {"adapter_config.json", "adapter_model.safetensors", "peftstate.json"},
}
"""What must be in a folder after a save."""


def first_load(bench: Bench, repetitions: int) -> Comparison:
    """`from_pretrained` onto a base model that was not read before."""
    return _load(bench.first_load, repetitions)


def further_load(bench: Bench, repetitions: int) -> Comparison:
    """`from_pretrained` onto a base model that earlier loads of the same process have read."""
    return _load(bench.load, repetitions)


def _load(run: Callable[[Library], Sample], repetitions: int) -> Comparison:
    """Loads onto a base model that has no adapter."""
    runs = {library.name: partial(run, library) for library in (PEFT, PEFTSTATE)}
    found = alternately(runs, repetitions)
    return Comparison(found[PEFT.name], found[PEFTSTATE.name])


def save(bench: Bench, repetitions: int) -> tuple[Comparison, Comparison]:
    """`save_pretrained` of a model that was never read, and a third time when nothing changed."""
    runs = {library.name: partial(_save_thrice, bench, library) for library in (PEFT, PEFTSTATE)}
    found = alternately(runs, repetitions)
    first, again = (
        Comparison(
            *(tuple(run[number] for run in found[library.name]) for library in (PEFT, PEFTSTATE))
        )
        for number in range(2)
    )
    return first, again


def _save_thrice(bench: Bench, library: Library) -> tuple[Sample, Sample]:
    """Save a model into a new folder, and twice into the same one; the second time is not taken.

    Raises:
        RuntimeError: A file is missing.
    """
    folder = bench.adapter.with_name("saved")
    with bench.loaded(library) as (model, _), silently():
        _remembered.forget()
        first, _, third = (timed(partial(library.save, model, folder))[1] for _ in range(3))
    missing = WRITTEN[library.name] - {file.name for file in folder.iterdir()}
    if missing:
        raise RuntimeError(f"{library.name} has not written {missing}")
    shutil.rmtree(folder)
    return first, third
