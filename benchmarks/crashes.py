"""Saves whose process is killed, or whose disk fails, at each call on a file.

A save over an adapter is run in a process of its own, once for every system call by which it
changes a file: the process is killed there (`kill -9`), killed after half of a write, or the call
and all later ones fail as on a full disk. Then the folder is loaded: it must be the old or the new
generation. Each time the next save must succeed and leave nothing behind that is not its own.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import torch

from benchmarks import _page
from benchmarks._generations import EXTRA, MIXED, PEFT, PEFTSTATE, Generations, Library, silently
from benchmarks._syscalls import SUPPORTED, Decide, Event, How, Run, fail_from, kill_at, traced
from peftstate._folder import AdapterFolder
from peftstate._storage import (
    ADAPTER_CONFIG_NAME,
    MANIFEST_NAME,
    SIDECAR_NAME,
    WEIGHTS_NAMES,
)
from peftstate.errors import SaveError

OLD, NEW, NEXT = 0, 1, 2
FAILED = 3
"""The status of a process whose save raised the error that it should."""


@attrs.frozen(kw_only=True)
class Scenario:
    """A save that goes wrong.

    Attributes:
        name: What is saved over what.
        before: Makes the folder as it is before the save.
        old: The generation that it is of then; `None` if there is nothing.
        options: Of `save_pretrained`.
    """

    name: str
    before: Callable[[Generations, Library, Path], None]
    old: int | None = OLD
    options: dict[str, bool] = attrs.field(factory=dict)


def _nothing(_: Generations, __: Library, folder: Path) -> None:
    """No folder."""
    assert not folder.exists()  # noqa: S101


def _saved(generations: Generations, library: Library, folder: Path) -> None:
    """An adapter that was saved before."""
    library.save(generations.models[OLD], folder)


def _unfinished(generations: Generations, library: Library, folder: Path) -> None:
    """A save of the old generation that was killed in the middle of its moves, over another one."""
    library.save(generations.models[NEXT], folder)
    run = run_of(generations, library, OLD, folder)
    moves = [number for number, event in enumerate(run.events) if event.name == "rename"]
    shutil.rmtree(folder)
    library.save(generations.models[NEXT], folder)
    run_of(generations, library, OLD, folder, decide=kill_at(moves[len(moves) // 2]))


OVER_AN_ADAPTER = Scenario(name="over an adapter", before=_saved)
SCENARIOS = (
    OVER_AN_ADAPTER,
    Scenario(
        name="as .bin over .safetensors", before=_saved, options={"safe_serialization": False}
    ),
    Scenario(name="a first save", before=_nothing, old=None),
    Scenario(name="over a save that was killed", before=_unfinished),
)


@attrs.define
class Tally:
    """What became of the folder, each time that a save went wrong.

    Attributes:
        library: Whose save it was.
        what: What went wrong.
        is_read_only: Whether nothing could be removed any more.
        verdicts: What the folder loaded as, how often.
        broken: The promises that were broken, in words.
    """

    library: Library
    what: str
    is_read_only: bool = False
    verdicts: Counter[int | str] = attrs.field(factory=Counter)
    broken: list[str] = attrs.field(factory=list)

    @property
    def mixed(self) -> int:
        """How often two generations were loaded as one without a word."""
        return self.verdicts[MIXED]

    @property
    def unreadable(self) -> int:
        """How often nothing could be loaded."""
        return sum(number for verdict, number in self.verdicts.items() if _is_error(verdict))

    def row(self) -> list[str]:
        """The cells of a table."""
        counts = (self.verdicts[OLD], self.verdicts[NEW], self.mixed, self.unreadable)
        return [self.what, self.library.name, str(self.verdicts.total()), *map(str, counts)]


def _is_error(verdict: int | str) -> bool:
    """Whether a verdict is the name of an error."""
    return isinstance(verdict, str) and verdict != MIXED


def run_of(
    generations: Generations,
    library: Library,
    number: int,
    folder: Path,
    *,
    decide: Decide = lambda *_: None,
    before: Callable[[], object] = lambda: None,
    options: Mapping[str, bool] | None = None,
) -> Run:
    """Save a generation in a process of its own."""

    def work() -> None:
        torch.set_num_threads(1)  # of OpenMP's threads, a forked process has none
        before()
        try:
            library.save(generations.models[number], folder, **(options or {}))
        except Exception as error:
            if library is PEFTSTATE and not isinstance(error, SaveError):
                raise
            os._exit(FAILED)

    return traced(work, folder.parent, decide)


def kills(
    generations: Generations, library: Library, scenario: Scenario, *, step: int = 1
) -> tuple[Tally, Tally]:
    """Kill a save at each of its calls, and in the middle of each write.

    Args:
        generations: What is saved.
        library: Whose save it is.
        scenario: What it is saved over.
        step: Every how many calls, from the last on back.
    """
    where = f"{scenario.name}: killed"
    tallies = Tally(library, f"{where} before a call"), Tally(library, f"{where} within a write")
    with _workplace(generations, library, scenario) as (attempt, events):
        writes = [number for number, event in enumerate(events) if event.can_tear]
        for number in range(len(events))[::-step]:
            attempt(tallies[0], kill_at(number))
        for number in writes[:: -max(step // 3, 1)]:
            attempt(tallies[1], kill_at(number, How.TEAR))
    return tallies


def errors(
    generations: Generations,
    library: Library,
    scenario: Scenario,
    error: int,
    *names: str,
    step: int = 1,
) -> Tally:
    """Have the disk fail from a call on, for each call."""
    calls = ", ".join(names) or "every change"
    what = f"{scenario.name}: {errno.errorcode[error]} from a call on ({calls})"
    tally = Tally(library, what, is_read_only=not names)
    with _workplace(generations, library, scenario) as (attempt, events):
        numbers = [
            number for number, event in enumerate(events) if not names or event.name in names
        ]
        for number in numbers[::step]:
            attempt(tally, fail_from(number, error, *names))
    return tally


def limits(
    generations: Generations, library: Library, scenario: Scenario, *, steps: int = 12
) -> Tally:
    """Have no file grow beyond a size (`RLIMIT_FSIZE`), for some sizes."""
    tally = Tally(library, f"{scenario.name}: files limited to a size (RLIMIT_FSIZE)")
    with _workplace(generations, library, scenario) as (attempt, events):
        largest = max(event.size for event in events if event.name == "write")
        for size in range(0, largest, max(largest // steps, 1)):
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
            attempt(tally, lambda *_: None, limit)
    return tally


Attempt = Callable[..., None]


@contextmanager
def _workplace(
    generations: Generations, library: Library, scenario: Scenario
) -> Iterator[tuple[Attempt, tuple[Event, ...]]]:
    """A folder to try saves in: how to try one, and the calls that one makes."""
    with tempfile.TemporaryDirectory() as name:
        before, place = Path(name, "before", "adapter"), Path(name, "place")
        before.parent.mkdir()
        scenario.before(generations, library, before)

        def fresh() -> Path:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(before.parent, place, symlinks=True)
            return place / "adapter"

        def run(
            folder: Path,
            decide: Decide = lambda *_: None,
            setup: Callable[[], object] = lambda: None,
        ) -> Run:
            given = scenario.options
            return run_of(
                generations, library, NEW, folder, decide=decide, before=setup, options=given
            )

        def attempt(
            tally: Tally, decide: Decide, setup: Callable[[], object] = lambda: None
        ) -> None:
            folder = fresh()
            found = run(folder, decide, setup)
            _judge(tally, generations, scenario, folder, found)

        complete = run(fresh())
        assert complete.status == 0  # noqa: S101
        yield attempt, complete.events


def _judge(
    tally: Tally, generations: Generations, scenario: Scenario, folder: Path, run: Run
) -> None:
    """Load what a save has left, and save again."""
    verdict = generations.told(tally.library, folder)
    at = f"{len(run.events)} calls, the last {run.events[-1] if run.events else None}"
    if (
        scenario.old is None
        and _is_error(verdict)
        and not AdapterFolder.at(folder).exists(MANIFEST_NAME)
    ):
        verdict = OLD  # there was nothing, and there is nothing
    tally.verdicts[verdict] += 1
    if tally.library is PEFT:
        return
    alone = generations.told_alone(PEFTSTATE, folder)
    if alone != verdict and not (verdict == OLD and scenario.old is None):
        tally.broken.append(f"{tally.what}: {verdict}, but the second adapter {alone} after {at}")
    if verdict not in (OLD, NEW):
        tally.broken.append(f"{tally.what}: loads as {verdict} after {at}")
    if not run.was_killed:
        if run.status not in (0, FAILED):
            tally.broken.append(f"{tally.what}: ended with {run.status} after {at}")
        if run.status == FAILED and (
            verdict != OLD or (_litter(folder) and not tally.is_read_only)
        ):
            tally.broken.append(f"{tally.what}: {verdict}, {_litter(folder)} left after {at}")
    tally.library.save(generations.models[NEXT], folder)
    if generations.told(tally.library, folder) != NEXT or _litter(folder):
        tally.broken.append(f"{tally.what}: the next save left {_litter(folder)} after {at}")


FILES = ("README.md", ADAPTER_CONFIG_NAME, MANIFEST_NAME, SIDECAR_NAME, *WEIGHTS_NAMES)


def _litter(folder: Path) -> list[str]:
    """What is in a folder, or beside it, that no save leaves there for good."""
    paths = {path.relative_to(folder.parent).as_posix() for path in folder.parent.rglob("*")}
    expected = {f"{folder.name}/{name}" for name in (*FILES, EXTRA)}
    expected |= {f"{folder.name}/{EXTRA}/{name}" for name in FILES}
    kept = sum((folder / name).exists() for name in WEIGHTS_NAMES)
    return sorted(paths - expected - {folder.name}) + (["two files of weights"] * (kept > 1))


def litter(generations: Generations, *, saves: int) -> Tally:
    """Kill many saves of one folder at random, one after the other, and see what piles up."""
    tally = Tally(PEFTSTATE, f"{saves} killed saves in a row, at random calls")
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "adapter")
        PEFTSTATE.save(generations.models[OLD], folder)
        calls = len(run_of(generations, PEFTSTATE, OLD, folder).events)
        usual = len(list(folder.rglob("*")))
        for _ in range(saves):
            number = chance.choice((OLD, NEW))
            run_of(generations, PEFTSTATE, number, folder, decide=kill_at(chance.randrange(calls)))
            verdict = generations.told(PEFTSTATE, folder)
            tally.verdicts[verdict] += 1
            entries = len(list(folder.rglob("*")))
            # What one save stages, and what the one before has committed and not yet moved.
            if verdict not in (OLD, NEW) or entries > 4 * usual:
                tally.broken.append(f"{tally.what}: {verdict}, {entries} entries")
        PEFTSTATE.save(generations.models[NEXT], folder)
        if _litter(folder):
            tally.broken.append(f"{tally.what}: the last save left {_litter(folder)}")
    return tally


def small_disk(generations: Generations) -> Tally | None:
    """Save on a real disk that is full, for some sizes of it; `None` if it may not be mounted."""
    tally = Tally(PEFTSTATE, "over an adapter: a full disk (tmpfs of some sizes)")
    with tempfile.TemporaryDirectory() as name:
        for spare in range(0, 160, 8):
            disk = Path(name, f"disk-{spare}")
            disk.mkdir()
            if not _mount(disk):
                return None
            try:
                _fill_and_save(tally, generations, disk, spare * 1024)
            finally:
                subprocess.run(["umount", str(disk)], check=True)  # noqa: S603, S607
    return tally


def _mount(disk: Path) -> bool:
    """Mount a small disk."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0  # noqa: S603


def _fill_and_save(tally: Tally, generations: Generations, disk: Path, spare: int) -> None:
    """Save on a disk that has so much space left."""
    folder = disk / "adapter"
    PEFTSTATE.save(generations.models[OLD], folder)
    filler = disk.with_name(f"{disk.name}.filler"), disk / "filler"
    free = shutil.disk_usage(disk).free
    filler[1].write_bytes(b"\0" * max(free - spare, 0))
    run = run_of(generations, PEFTSTATE, NEW, folder)
    filler[1].unlink()
    _judge(tally, generations, OVER_AN_ADAPTER, folder, run)


def measure(*, quick: bool = False) -> Iterator[Tally]:
    """Run all of it, or a part that takes seconds."""
    generations = Generations.of((OLD, NEW, NEXT))
    yield from kills(generations, PEFT, OVER_AN_ADAPTER)
    yield from kills(generations, PEFTSTATE, OVER_AN_ADAPTER, step=13 if quick else 1)
    if quick:
        yield litter(generations, saves=5)
        return
    for scenario in SCENARIOS[1:]:
        if scenario.before is _saved:
            yield from kills(generations, PEFT, scenario)
        yield from kills(generations, PEFTSTATE, scenario)
    yield litter(generations, saves=100)
    writes = ("write", "sendfile", "openat", "mkdir", "ftruncate")
    for library in (PEFT, PEFTSTATE):
        fail = partial(errors, generations, library, OVER_AN_ADAPTER)
        yield fail(errno.ENOSPC, *writes)
        yield fail(errno.EDQUOT, *writes, step=3)
        yield fail(errno.EIO, *writes, step=3)
        yield fail(errno.EROFS, step=3)
        yield fail(errno.EACCES, step=3)
        yield fail(errno.EXDEV, "rename", "renameat")
        yield limits(generations, library, OVER_AN_ADAPTER)
    disk = small_disk(generations)
    if disk is not None:
        yield disk


def table(tallies: list[Tally]) -> _page.Table:
    """The figures."""
    ours = [tally for tally in tallies if tally.library is PEFTSTATE]
    number = sum(tally.verdicts.total() for tally in ours)
    mixed = sum(tally.mixed + tally.unreadable for tally in ours)
    return _page.Table(
        name="crashes",
        command="python -m benchmarks.crashes",
        columns=[
            "a save",
            "by",
            "times",
            "loads as old",
            "as new",
            "mixed, silently",
            "not at all",
        ],
        rows=[tally.row() for tally in tallies],
        note=(
            f"Of {number} saves by peftstate that went wrong, {mixed} left a folder that is not "
            f"the old or the new generation; {sum(len(tally.broken) for tally in ours)} left "
            "anything behind after the next save, or raised anything but a `SaveError`."
        ),
    )


def main() -> int:
    """Run the benchmark; the status tells whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every thirteenth call, in seconds")
    parser.add_argument("--write", action="store_true", help="put the figures on their page")
    arguments = parser.parse_args()
    if not SUPPORTED:
        print("System calls can be made to fail on Linux on x86-64 only.")
        return 0
    tallies = []
    with silently():
        for tally in measure(quick=arguments.quick):
            print(*tally.row(), *tally.broken, sep=" | ", file=sys.stderr, flush=True)
            tallies.append(tally)
    result = table(tallies)
    print(result.markdown())
    if arguments.write:
        _page.write(result, "reliability.md")
    return any(tally.broken for tally in tallies)


if __name__ == "__main__":
    sys.exit(main())
