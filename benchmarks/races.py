"""Processes that save into a folder in a loop, and processes that load it in a loop.

Each load must give one whole generation, or a typed error; a mixture of two must never pass.
Savers must not need locks for that: many network file systems have none, or some that do not hold.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import fcntl
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks import _page
from benchmarks._generations import MIXED, PEFT, PEFTSTATE, Generations, Library, silently

FORKED = multiprocessing.get_context("fork")


def _no_locks(_: int, __: int) -> None:
    """`flock` of a file system that has none."""
    raise OSError(errno.ENOLCK, "No locks available")


def _lies(_: int, __: int) -> None:
    """`flock` of a file system on which everybody gets the lock."""


LOCKS: dict[str, Callable[[int, int], None] | None] = {
    "": None,
    "flock fails": _no_locks,
    "flock lies": _lies,
}


@attrs.frozen(kw_only=True)
class Race:
    """Savers against readers.

    Attributes:
        library: Whose saves and loads they are.
        savers: How many processes save.
        readers: How many processes load.
        adapters: How many adapters each save writes.
        locks: What `flock` does, a key of `LOCKS`.
        pause: Seconds between two saves of a saver, at most.
        only_files: Whether the readers read and check the files, and load no model.
    """

    library: Library
    savers: int = 1
    readers: int = 1
    adapters: int = 1
    locks: str = ""
    pause: float = 0.0
    only_files: bool = False


@attrs.frozen
class Outcome:
    """What came of a race.

    Attributes:
        race: The race.
        reads: What the loads gave, how often: a generation, `MIXED`, or the name of an error.
        saves: How the saves went, how often: ``"saved"`` or the name of an error.
        last: What the folder loads as in the end.
    """

    race: Race
    reads: Counter[int | str]
    saves: Counter[int | str]
    last: int | str

    @property
    def whole(self) -> int:
        """How many loads gave a generation."""
        return sum(number for verdict, number in self.reads.items() if isinstance(verdict, int))

    @property
    def mixed(self) -> int:
        """How many loads gave a mixture without a word."""
        return self.reads[MIXED]

    @property
    def untyped(self) -> int:
        """How many loads raised an error that is not of the library."""
        return sum(
            number for verdict, number in self.reads.items() if str(verdict).startswith("untyped")
        )

    @property
    def broken(self) -> list[str]:
        """The promises that were broken, in words."""
        if self.race.library is PEFT:
            return []
        total, broken = self.reads.total(), []
        if self.mixed or self.untyped or not isinstance(self.last, int):
            broken.append(f"{self.race}: {dict(self.reads)}, in the end {self.last}")
        if self.race.savers == 1 and self.whole < 0.99 * total:
            broken.append(f"{self.race}: {self.whole} of {total} loads succeeded")
        if set(self.saves) != {"saved"}:
            broken.append(f"{self.race}: {dict(self.saves)}")
        return broken

    def row(self) -> list[str]:
        """The cells of a table."""
        race, total = self.race, self.reads.total()
        typed = total - self.whole - self.mixed - self.untyped
        what = f"{_number(race.savers, 'saver')}, {_number(race.readers, 'reader')}"
        what += f", {race.adapters} adapters" * (race.adapters > 1)
        what += f", {race.pause} s between saves" * (race.pause > 0)
        what += f", {race.locks}" * bool(race.locks)
        what += ", files only" * race.only_files
        shares = [self.whole, self.mixed, typed, self.untyped]
        saved = self.saves["saved"]
        return [
            what,
            race.library.name,
            str(saved),
            str(total),
            *(f"{share} ({100 * share / total:.1f} %)" if share else "0" for share in shares),
        ]


def _number(number: int, name: str) -> str:
    """A number of things."""
    return f"{number} {name}{'s' * (number > 1)}"


@attrs.frozen
class _Track:
    """Where a race is run.

    Attributes:
        race: The race.
        generations: What is saved.
        place: A folder for what is saved and for what the processes report.
        end: When it ends.
    """

    race: Race
    generations: Generations
    place: Path
    end: float

    @property
    def folder(self) -> Path:
        """Where to save."""
        return self.place / "adapter"

    def save(self, number: int) -> None:
        """Save a generation."""
        model = self.generations.models[number]
        names = list(model.peft_config)[: self.race.adapters]
        self.race.library.save(model, self.folder, selected_adapters=names)

    def read(self) -> int | str:
        """Load what there is."""
        if self.race.only_files:
            return self.generations.read(self.folder, adapters=self.race.adapters)
        return self.generations.told(self.race.library, self.folder, adapters=self.race.adapters)

    def save_often(self, report: Path, index: int) -> None:
        """In a process of its own: save one generation after the other."""
        _begin(index)
        flock = LOCKS[self.race.locks]
        if flock is not None:
            fcntl.flock = flock  # type: ignore[assignment]  # in this process only
        while time.monotonic() < self.end:
            for number in range(index, len(self.generations.models), self.race.savers):
                try:
                    self.save(number)
                    _report(report, "saved")
                except Exception as error:  # noqa: BLE001 - what is raised is what is measured
                    _report(report, f"{type(error).__name__}: {error}")
                time.sleep(self.race.pause * random.random())

    def read_often(self, report: Path, index: int) -> None:
        """In a process of its own: load over and over."""
        _begin(index)
        _report(report, self.read())
        while time.monotonic() < self.end:
            _report(report, self.read())


def _begin(index: int) -> None:
    """Begin in a forked process, which may be killed: then its report says how far it came."""
    faulthandler.disable()
    torch.set_num_threads(1)  # of OpenMP's threads, a forked process has none
    random.seed(index)


def _report(report: Path, verdict: int | str) -> None:
    """Add a line to a report."""
    with report.open("a") as file:
        file.write(f"{json.dumps(verdict)}\n")


def run(race: Race, generations: Generations, seconds: float) -> Outcome:
    """Let savers and readers loop for some time."""
    with tempfile.TemporaryDirectory() as name:
        track = _Track(race, generations, Path(name), time.monotonic() + seconds)
        track.save(0)
        savers = [
            _start(track.save_often, track.place / f"saver-{index}", index)
            for index in range(race.savers)
        ]
        readers = [
            _start(track.read_often, track.place / f"reader-{index}", index)
            for index in range(race.readers)
        ]
        saves = sum((_counts(*saver) for saver in savers), Counter[int | str]())
        reads = sum((_counts(*reader) for reader in readers), Counter[int | str]())
        return Outcome(race, reads, saves, track.read())


def _start(job: Callable[[Path, int], None], report: Path, index: int) -> tuple[Any, Path]:
    """Start a process, and say where its report is."""
    process = FORKED.Process(target=job, args=(report, index))
    process.start()
    return process, report


def _counts(process: Any, report: Path) -> Counter[int | str]:
    """What a process has reported, and how it ended if that was not as it should."""
    process.join()
    verdicts = map(json.loads, report.read_text().splitlines()) if report.exists() else []
    counts: Counter[int | str] = Counter(verdicts)
    if process.exitcode:
        # safetensors maps a file into memory, which is a bus error when it is cut meanwhile.
        counts[f"untyped end of the process, with {process.exitcode}"] += 1
    return counts


RACES = (
    *(Race(library=PEFT, savers=savers, readers=2) for savers in (1, 2)),
    *(Race(library=PEFTSTATE, savers=savers, readers=2) for savers in (1, 2)),
    *(
        Race(library=PEFTSTATE, savers=savers, readers=2, adapters=2, locks=locks)
        for savers in (1, 2)
        for locks in LOCKS
    ),
    *(
        Race(library=PEFTSTATE, savers=savers, readers=2, adapters=2, only_files=True)
        for savers in (1, 2)
    ),
    *(Race(library=library, readers=2, pause=0.2) for library in (PEFT, PEFTSTATE)),
)
QUICK = (
    Race(library=PEFT),
    Race(library=PEFTSTATE, adapters=2, only_files=True),
    Race(library=PEFTSTATE, savers=2, locks="flock lies"),
)


def measure(races: Sequence[Race], seconds: float) -> list[Outcome]:
    """Run races one after the other."""
    with silently():
        generations = Generations.of(range(6))
        return [run(race, generations, seconds) for race in races]


def table(outcomes: Sequence[Outcome]) -> _page.Table:
    """The figures."""
    return _page.Table(
        name="races",
        command="python -m benchmarks.races",
        columns=[
            "in a loop", "by", "saves", "loads", "whole", "mixed, silently", "a typed error",
            "another error",
        ],
        rows=[outcome.row() for outcome in outcomes],
    )  # fmt: skip


def main() -> int:
    """Run the benchmark; the status tells whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three races of 4 seconds")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a race lasts")
    parser.add_argument("--write", action="store_true", help="put the figures on their page")
    arguments = parser.parse_args()
    races, seconds = (QUICK, 4.0) if arguments.quick else (RACES, arguments.seconds)
    outcomes = measure(races, seconds)
    result = table(outcomes)
    print(result.markdown())
    broken = [text for outcome in outcomes for text in outcome.broken]
    print(*broken, sep="\n", file=sys.stderr)
    if arguments.write:
        _page.write(result, "reliability.md")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
