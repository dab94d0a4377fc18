"""Hostile folders: each must be refused with an error of peftstate's, soon, in bounded memory.

First those that were thought of (`benchmarks/_hostile`), then folders at random. Watched are also
the processes, the sockets, the imports and the files of a load.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from benchmarks import _page
from benchmarks._hostile import fuzz, manifests, places, sidecars, values
from benchmarks._hostile.case import MANIFEST, Case
from benchmarks._hostile.scene import Scene, Watch

KINDS: dict[str, tuple[Case, ...]] = {
    "manifests: bytes, JSON, schema, seal, structure": manifests.CASES,
    "names, links, pipes, devices": places.CASES,
    "sidecars and weights, states of random generators": sidecars.CASES,
    "values that the format allows, PEFT configs": values.CASES,
}
"""The folders that were thought of, by what they are about."""
QUICK_STEP = 9
"""Of so many cases one is tried in a short run."""
_STATUS = Path("/proc/self/status")
_PEAK = Path("/proc/self/clear_refs")


@attrs.define
class Row:
    """The figures of one kind of folder.

    Attributes:
        name: What they are.
        tally: What came of them.
        memory: The most memory that a load took beyond what the process had, in MB; `None` where
            the system does not tell.
    """

    name: str
    tally: fuzz.Tally
    memory: int | None = None

    def cells(self) -> list[str]:
        """A row of the table."""
        tally = self.tally
        return [
            self.name,
            f"{tally.tried:,}",
            f"{sum(tally.refused.values()):,}",
            f"{tally.loaded:,}",
            str(len(tally.broken)),
            f"{tally.slowest:.1f} s",
            "?" if self.memory is None else f"{self.memory} MB",
        ]


@contextlib.contextmanager
def measured(row: Row) -> Iterator[None]:
    """Measure the most memory that the body takes."""
    with contextlib.suppress(OSError):
        _PEAK.write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    yield
    after = _memory("VmHWM")
    row.memory = None if before is None or after is None else max(after - before, row.memory or 0)


def _memory(field: str) -> int | None:
    """A figure of the process's memory in MB, if the system tells."""
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def try_case(scene: Scene, watch: Watch, case: Case, tally: fuzz.Tally) -> None:
    """Load one folder, and see whether the right error says the right thing."""
    folder = scene.make(case)

    def load() -> None:
        try:
            scene.load(folder, by_auto=case.by_auto)
        except Exception as error:
            if case.error is None or not isinstance(error, case.error):
                raise
            if case.tells not in str(error):
                tally.broken.append(f"{case.name}: {error} does not tell of {case.tells!r}")
            raise
        if case.error is not None:
            tally.broken.append(f"{case.name}: loaded")

    refused = sum(tally.refused.values())
    with watch.over(scene.place) as seen:
        tally.count(case.name, load)
    if case.error is None and sum(tally.refused.values()) > refused:
        tally.broken.append(f"{case.name}: refused")
    tally.broken += [f"{case.name}: {event}" for event in seen]


def corpus(scene: Scene, watch: Watch, *, quick: bool) -> list[Row]:
    """Try the folders that were thought of."""
    rows = []
    for name, cases in KINDS.items():
        row = Row(name, fuzz.Tally())
        for case in cases[:: QUICK_STEP if quick else 1]:
            with measured(row):
                try_case(scene, watch, case, row.tally)
        rows.append(row)
    return rows


def at_random(scene: Scene, watch: Watch, *, seconds: float) -> list[Row]:
    """Try manifests and folders at random, half of the time each."""
    good = (scene.good / MANIFEST).read_bytes()
    read, load = Row("manifests at random", fuzz.Tally()), Row("folders at random", fuzz.Tally())
    tries: tuple[tuple[Row, Callable[[fuzz.Mutator, str], None]], ...] = (
        (read, lambda mutator, label: fuzz.read_one(good, mutator, read.tally, label)),
        (load, lambda mutator, label: fuzz.load_one(scene, watch, mutator, load.tally, label)),
    )
    for row, attempt in tries:
        end = time.monotonic() + seconds / 2
        with measured(row):
            while time.monotonic() < end:
                seed = row.tally.tried
                attempt(fuzz.Mutator(random.Random(seed)), f"{row.name}, seed {seed}")
    return [read, load]


def table(rows: list[Row], *, seconds: float) -> _page.Table:
    """The table of a run."""
    total = sum(row.tally.tried for row in rows)
    broken = sum(len(row.tally.broken) for row in rows)
    return _page.Table(
        name="hostile",
        command=f"python -m benchmarks.hostile --seconds {seconds:g} --write",
        columns=[
            "folders",
            "tried",
            "refused with a typed error",
            "loaded, harmless",
            "promises broken",
            "most processor time",
            "most memory",
        ],
        rows=[row.cells() for row in rows],
        note=(
            f"{broken} of {total:,} folders broke a promise: another library's or Python's error, "
            f"more than {fuzz.HANG:g} s of processor time, a process, a socket, an import, or a "
            "file written elsewhere. Of a folder that was thought of, the error must be of the "
            "class, and name the file or the field, that were written down before."
        ),
    )


def measure(*, quick: bool, seconds: float) -> list[Row]:
    """All figures."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as place:
        scene, watch = Scene.at(Path(place)), Watch()
        for by_auto in (False, True):  # what is imported at the first load is no matter
            scene.load(scene.good, by_auto=by_auto)
        rows = corpus(scene, watch, quick=quick)
        return rows + at_random(scene, watch, seconds=seconds)


def main() -> int:
    """Run the benchmark; the status tells whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="some cases, and 4 s at random")
    parser.add_argument("--seconds", type=float, default=60, help="time for folders at random")
    parser.add_argument("--write", action="store_true", help="put the figures on their page")
    arguments = parser.parse_args()
    seconds = 4 if arguments.quick else arguments.seconds
    logging.disable(logging.CRITICAL)
    rows = measure(quick=arguments.quick, seconds=seconds)
    result = table(rows, seconds=seconds)
    print(result.markdown())
    broken = [text for row in rows for text in row.tally.broken]
    print(*broken, sep="\n", file=sys.stderr)
    if arguments.write:
        _page.write(result, "reliability.md")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
