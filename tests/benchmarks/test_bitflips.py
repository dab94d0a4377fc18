"""Single bits flipped in the files of an adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import bitflips
from benchmarks._faults import trainer
from benchmarks._faults.edits import CONFIG, MANIFEST, SIDECAR, WEIGHTS
from benchmarks._faults.scene import Outcome, Saved, ours
from benchmarks.bitflips import OURS, TRAINER, Tally
from peftstate.errors import IntegrityError

FLIPS = 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A saved model, which no test may change."""
    return Saved.make(tmp_path_factory.mktemp("bitflips"))


@pytest.mark.parametrize("file", [SIDECAR, MANIFEST, WEIGHTS])
def test_no_flip_is_missed(file: str, saved: Saved, tmp_path: Path) -> None:
    """Whichever bit is flipped, the load raises an error of ours and moves no generator."""
    tally = bitflips._of_file(saved, tmp_path / "adapter", file, (ours, OURS), FLIPS)
    assert tally == Tally(file=file, loader=OURS, flips=FLIPS, typed=FLIPS)


def test_no_flip_of_the_config_does_harm(saved: Saved, tmp_path: Path) -> None:
    """A flip in what says nothing of the adapter changes nothing; any other one is an error."""
    tally = bitflips._of_file(saved, tmp_path / "adapter", CONFIG, (ours, OURS), FLIPS)
    assert tally.typed > tally.unchanged > 0
    assert tally.typed + tally.unchanged == tally.flips == FLIPS


def test_tally() -> None:
    """What breaks a promise of ours is told, each kind of it."""
    tally = Tally(file="f", loader=OURS)
    tally.add(Outcome(error=IntegrityError("f", "a", "b"), left_alone=True))
    tally.add(Outcome(delta=0.0, same_draws=True))
    assert tally.broken == []
    tally.add(Outcome(error=KeyError("f"), left_alone=True))
    tally.add(Outcome(error=IntegrityError("f", "a", "b")))
    tally.add(Outcome(delta=0.0))
    tally.add(Outcome(delta=0.1, same_draws=True, warned=("something",)))
    assert tally.broken == [
        "f: 2 loads of another state",
        "f: 1 errors that are not typed",
        "f: 1 errors that left a generator changed",
    ]
    assert tally.row()[2:] == ["6", "**1 (17%)**", "1", "1", "2", "1 of 1 types", "1"]


def test_tally_of_the_trainer() -> None:
    """What the Trainer does is counted, and breaks no promise of ours."""
    tally = Tally(file="f", loader=TRAINER)
    for found in (
        trainer.Restored(error="killed"),
        trainer.Restored(error="KeyError"),
        trainer.Restored(error="KeyError", left_alone=True),
        trainer.Restored(same_draws=True),
        trainer.Restored(),
    ):
        tally.add_restored(found)
    assert tally.broken == []
    assert tally.row()[2:] == ["5", "**1 (20%)**", "0", "1", "0", "2 of 1 types, 1 crashes", "1"]


def test_flips_are_always_the_same() -> None:
    """They are different bits, all over the file, and the same in each run."""
    flips = bitflips.chosen(1000, 200)
    assert flips == bitflips.chosen(1000, 200) == sorted(set(flips))
    assert min(flips)[0] < 100
    assert max(flips)[0] > 900
    assert {bit for _, bit in flips} == set(range(8))
    assert bitflips.chosen(2, 200) == [divmod(bit, 8) for bit in range(16)]


def test_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command counts every file, the Trainer's too; no promise is broken."""
    monkeypatch.setattr(sys, "argv", ["bitflips", "--quick"])
    monkeypatch.setattr(bitflips, "QUICK", 12)
    assert bitflips.main() == 0
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| `")]
    assert [row[2] for row in rows] == ["12"] * 7
    assert "loads another state than the saved one after 0 of 48 flips" in printed
