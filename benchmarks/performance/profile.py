"""Where the time of a load, of a save and of a further adapter goes, step by step.

The functions that do the steps are given a stopwatch. What one of them calls that has a stopwatch
of its own is not counted twice. The times are those of the thread that works on the model: what
other threads do meanwhile is seen only where it waits for them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from statistics import median
from typing import Any, TypeVar
from unittest import mock

import attrs

import peftstate
from benchmarks._generations import silently
from benchmarks.fidelity._libraries import PEFTSTATE
from benchmarks.performance._measure import timed
from benchmarks.performance._workloads import WORKLOADS, Bench, bare
from peftstate.sections import _remembered

T = TypeVar("T")

Steps = Mapping[str, Sequence[str]]
"""What is done → the functions that do it: modules of the package, and names in them."""

REST = "everything else"

LOAD: Steps = {
    "read the files": (
        "_models:folder_with_manifest",
        "_models:read_source",
        "_models:check_beside",
    ),
    "compare the base model": (
        "_base_check:check_base",
        "_base_check:_remembering",
        "_base_check:Ahead.begun",
        "_loading:check_base_if_changed",
    ),
    "inject": ("_injectors:Injector.put_in", "_models:wrap", "_models:add"),
    "inject, by PEFT's own load": (
        "_models:peft.PeftModel.from_pretrained",
        "_models:peft.PeftModel.load_adapter",
    ),
    "set the tensors": ("_loading:set_tensors",),
    "wait for the digests of the base model": ("_base_check:Ahead.agrees", "_base_check:Ahead.end"),
    "restore": (
        "_loading:prepare_base",
        "_loading:restore_sections",
        "_loading:dtype.restore_adapters",
        "_loading:adapters.restore_scaling",
    ),
    "compare what was restored": ("_loading:compare_restored",),
    "remember what a failure would have to undo": (
        "_loading:undone_on_failure",
        "_loading:_spare_data",
    ),
}
SAVE: Steps = {
    "digest the base model": (
        "sections.base_model:records",
        "sections._origin:records",
    ),
    "capture the rest of the state": ("_saving:capture_sections",),
    "write the adapter, by PEFT": ("_saving:_write_adapters",),
    "describe what was written": ("_saving:write_state",),
    "bring it onto the disk (fsync)": ("_storage:_seal",),
    "commit": ("_storage:_commit", "_storage:_finish_committed"),
}


@attrs.define
class Stopwatch:
    """Adds up time by step, that of the innermost one only.

    Attributes:
        spent: Seconds by step.
    """

    spent: dict[str, float] = attrs.field(factory=lambda: defaultdict(float))
    _running: list[str] = attrs.field(factory=list)
    _since: float = 0.0

    @contextmanager
    def on(self, step: str) -> Iterator[None]:
        """Count what is done within for a step."""
        self._credit()
        self._running.append(step)
        try:
            yield
        finally:
            self._credit()
            self._running.pop()

    def _credit(self) -> None:
        """Give the step that was running the time since the last change."""
        now = time.perf_counter()
        if self._running:
            self.spent[self._running[-1]] += now - self._since
        self._since = now

    def watched(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts for a step."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.on(step):
                return function(*arguments, **options)

        return call


@contextmanager
def watching(stopwatch: Stopwatch, steps: Steps) -> Iterator[None]:
    """Have the functions of the steps count for them."""
    with ExitStack() as stack:
        for step, functions in steps.items():
            for function in functions:
                module, _, path = function.partition(":")
                *owner, name = path.split(".")
                holder = resolve_name(".".join([f"peftstate.{module}", *owner]))
                watched = stopwatch.watched(step, getattr(holder, name))
                stack.enter_context(mock.patch.object(holder, name, watched))
        yield


def profile(work: Callable[[], T], steps: Steps) -> tuple[T, dict[str, float]]:
    """Do some work once, and give with its result the seconds of each step, in their order."""
    stopwatch = Stopwatch()

    def watched() -> T:
        with stopwatch.on(REST):
            return work()

    with watching(stopwatch, steps), silently():
        result, _ = timed(watched)
    return result, {step: stopwatch.spent[step] for step in (*steps, REST)}


def of_first_load(bench: Bench) -> dict[str, float]:
    """A load onto a bare base model that was not read before."""
    _remembered.forget()
    return of_load(bench)


def of_load(bench: Bench) -> dict[str, float]:
    """A load onto a bare base model that two earlier loads have read."""
    load = partial(PEFTSTATE.load, bench.base, bench.adapter, is_trainable=False)
    model, found = profile(load, LOAD)
    bench.base = bare(model)
    return found


def of_load_adapter(bench: Bench) -> dict[str, float]:
    """A further adapter on a live model, which was digested when the first one was loaded."""
    with bench.loaded(PEFTSTATE) as (model, _):
        return profile(partial(model.load_adapter, bench.adapter, "further"), LOAD)[1]


def of_save(bench: Bench) -> dict[str, float]:
    """A save of a model that was just loaded, as of one that was never read."""
    with bench.loaded(PEFTSTATE) as (model, _), tempfile.TemporaryDirectory() as folder:
        _remembered.forget()
        return profile(partial(model.save_pretrained, Path(folder, "saved")), SAVE)[1]


PATHS: Mapping[str, Callable[[Bench], dict[str, float]]] = {
    "from_pretrained": of_first_load,
    "from_pretrained-again": of_load,
    "load_adapter": of_load_adapter,
    "save_pretrained": of_save,
}


def medians(
    path: Callable[[Bench], dict[str, float]], bench: Bench, repetitions: int
) -> dict[str, float]:
    """The median of each step's seconds, the first run left out."""
    runs = [path(bench) for _ in range(repetitions + 1)][1:]
    found = {step: median(run[step] for run in runs) for step in runs[0]}
    return {step: seconds for step, seconds in found.items() if seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the steps of each path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.make(WORKLOADS[options.workload], Path(folder, "adapter"))
        print(f"{options.workload}, peftstate {peftstate.__version__}, milliseconds")
        for name, path in PATHS.items():
            print(f"\n{name}")
            found = medians(path, bench, options.repetitions)
            for step, seconds in found.items():
                print(f"{1e3 * seconds:9.1f}  {step}")
            print(f"{1e3 * sum(found.values()):9.1f}  together")


if __name__ == "__main__":
    main()
