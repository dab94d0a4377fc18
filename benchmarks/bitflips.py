"""Single bits flipped in the files of an adapter, one at a time, and what a load makes of each.

Beside it, the same for the file in which the `Trainer` of transformers keeps random generators, and
for plain PEFT's files. Where a load succeeds, its logits and the random numbers after it are
compared with the saved model's.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs
import transformers

from benchmarks import _page
from benchmarks._faults import trainer
from benchmarks._faults.edits import CONFIG, MANIFEST, SIDECAR, WEIGHTS, flip
from benchmarks._faults.scene import Case, Loader, Outcome, Saved, ours, outcome, plain_peft
from benchmarks._generations import silently

FLIPS = 2000
"""Flips in each file."""
QUICK = 60

PLAIN, OURS, TRAINER = "plain PEFT", "peftstate", "`Trainer`"


@attrs.define(kw_only=True)
class Tally:
    """What came of all flips in one file.

    Attributes:
        file: The file.
        loader: What loaded it.
        flips: How many bits were flipped.
        wrong: Loads without an error or a warning that gave other logits or random numbers.
        warned: The same, with a warning.
        unchanged: Loads that gave the saved state.
        typed: Errors that are ours.
        others: The classes of the other errors.
        killed: Times that the process died.
        half_done: Errors after which a random generator was not as before.
    """

    file: str
    loader: str
    flips: int = 0
    wrong: int = 0
    warned: int = 0
    unchanged: int = 0
    typed: int = 0
    others: list[str] = attrs.field(factory=list)
    killed: int = 0
    half_done: int = 0

    def add(self, found: Outcome) -> None:
        """Count a load of an adapter."""
        self.flips += 1
        if found.error is not None:
            self.half_done += not found.left_alone
            if found.is_typed:
                self.typed += 1
            else:
                self.others.append(type(found.error).__name__)
        elif found.is_wrong or (self.loader == OURS and not found.same_draws):
            self.warned += bool(found.warned)
            self.wrong += not found.warned
        else:
            self.unchanged += 1

    def add_restored(self, found: trainer.Restored) -> None:
        """Count a restore by the Trainer."""
        self.flips += 1
        if found.error == "killed":
            self.killed += 1
        elif found.error:
            self.half_done += not found.left_alone
            self.others.append(found.error)
        elif found.same_draws:
            self.unchanged += 1
        else:
            self.wrong += 1

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, if it is of ours."""
        if self.loader != OURS:
            return []
        counts = {
            "loads of another state": self.wrong + self.warned,
            "errors that are not typed": len(self.others),
            "errors that left a generator changed": self.half_done,
        }
        return [f"{self.file}: {count} {what}" for what, count in counts.items() if count]

    def row(self) -> list[str]:
        """The cells of its row."""
        kinds = len(set(self.others))
        others = f"{len(self.others)} of {kinds} types" if self.others else "0"
        share = f" ({self.wrong / self.flips:.0%})" if self.wrong else ""
        return [
            f"`{self.file}`",
            self.loader,
            str(self.flips),
            f"**{self.wrong}{share}**",
            str(self.warned),
            str(self.unchanged),
            str(self.typed),
            others + (f", {self.killed} crashes" if self.killed else ""),
            str(self.half_done),
        ]


def chosen(size: int, count: int) -> list[tuple[int, int]]:
    """Offset and bit of flips all over a file, always the same ones."""
    bits = random.Random(0).sample(range(8 * size), min(count, 8 * size))
    return [divmod(bit, 8) for bit in sorted(bits)]


def measure(root: Path, count: int) -> Iterator[Tally]:
    """Flip bits in every file.

    Args:
        root: An empty folder.
        count: How many in each.
    """
    (root / "trainer").mkdir()
    trainer.save(root / "trainer")
    yield _of_trainer(root / "trainer", count)
    saved = Saved.make(root)
    for file in (SIDECAR, MANIFEST, WEIGHTS, CONFIG):
        yield _of_file(saved, root / file, file, (ours, OURS), count)
    for file in (WEIGHTS, CONFIG):
        yield _of_file(saved, root / f"plain-{file}", file, (plain_peft, PLAIN), count)


def _of_trainer(folder: Path, count: int) -> Tally:
    """Flip bits in the Trainer's file."""
    tally = Tally(file=trainer.RNG_FILE, loader=TRAINER)
    flips = chosen((folder / trainer.RNG_FILE).stat().st_size, count)
    for found in trainer.restored(flips, folder):
        tally.add_restored(found)
    return tally


def _of_file(
    saved: Saved, folder: Path, name: str, loader: tuple[Loader, str], count: int
) -> Tally:
    """Flip bits in a file of an adapter."""
    tally = Tally(file=name, loader=loader[1])
    case = Case.of(saved, folder)
    base = case.base()
    case.base = lambda: copy.deepcopy(base)
    file = case.folder / name
    data = file.read_bytes()
    for offset, bit in chosen(len(data), count):
        file.write_bytes(data)
        flip(file, offset, bit)
        tally.add(outcome(case, loader[0]))
    return tally


def table(tallies: Sequence[Tally]) -> _page.Table:
    """The counts, a file a row."""
    mine = [tally for tally in tallies if tally.loader == OURS]
    return _page.Table(
        name="bitflips",
        command="python -m benchmarks.bitflips",
        columns=(
            "file",
            "loaded by",
            "bits flipped",
            "**other state, silently**",
            "other state, with a warning",
            "the saved state",
            "typed errors",
            "other errors",
            "errors that left a generator changed",
        ),
        rows=[tally.row() for tally in tallies],
        note=(
            f"peftstate loads another state than the saved one after "
            f"{_sum(tally.wrong + tally.warned for tally in mine)} of "
            f"{_sum(tally.flips for tally in mine)} flips."
        ),
    )


def _sum(counts: Iterable[int]) -> str:
    """A sum, as it is read."""
    return f"{sum(counts):,}"


def main() -> int:
    """Run the benchmark; the status tells whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} flips in each file")
    parser.add_argument("--write", action="store_true", help="put the figures on their page")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with silently(), tempfile.TemporaryDirectory(prefix="bitflips-") as directory:
        count = QUICK if arguments.quick else FLIPS
        tallies = list(measure(Path(directory), count))
    result = table(tallies)
    print(result.markdown())
    broken = [text for tally in tallies for text in tally.broken]
    print(*broken, sep="\n", file=sys.stderr)
    if arguments.write:
        _page.write(result, "reliability.md")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
