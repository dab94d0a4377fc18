"""Every fault of the harness, and the harness itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import faults
from benchmarks._faults.catalogue import FAULTS
from benchmarks._faults.edits import permissions_obeyed
from benchmarks._faults.fault import Fault
from benchmarks._faults.scene import Case, Outcome, Saved, ours, outcome
from peftstate.errors import IntegrityError, PeftStateError


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A saved model, which no test may change."""
    return Saved.make(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.key)
def test_fault(fault: Fault, saved: Saved, tmp_path: Path) -> None:
    """The fault raises its own error, which names file or field, or does no harm."""
    case = Case.of(saved, tmp_path / "adapter")
    fault.inject(case)
    found = outcome(case, ours)
    assert fault.complaints(case, found) == []
    if found.error is not None:
        assert type(found.error).__module__ == "peftstate.errors"


def test_no_fault(saved: Saved, tmp_path: Path) -> None:
    """Without a fault the saved model is loaded, so that each error is due to its fault."""
    found = outcome(Case.of(saved, tmp_path / "adapter"), ours)
    assert found == Outcome(delta=0.0, same_draws=True)


def test_each_fault_has_a_key_of_its_own() -> None:
    """The keys are those of the page."""
    keys = [fault.key for fault in FAULTS]
    assert len(set(keys)) == len(keys)
    studied = [key for key in keys if faults._is_of_the_study(key)]
    assert len(studied) == 42


def test_complaints(saved: Saved) -> None:
    """The harness complains of another error, of an error without the name, and of silence."""
    fault = Fault(key="z1", what="", inject=id, error=IntegrityError, names="weights")
    case = Case(saved=saved, folder=saved.folder, base=torch.nn.Identity)
    assert (
        fault.complaints(case, Outcome(error=IntegrityError("weights", "a", "b"), left_alone=True))
        == []
    )
    for found in (
        Outcome(error=IntegrityError("config", "a", "b"), left_alone=True),
        Outcome(error=PeftStateError("weights"), left_alone=True),
        Outcome(error=ValueError("weights"), left_alone=True),
        Outcome(error=IntegrityError("weights", "a", "b")),
        Outcome(error=IntegrityError("weights", "a", "b"), left_alone=True, hung=True),
        Outcome(delta=0.0, same_draws=True),
    ):
        assert len(fault.complaints(case, found)) == 1
    harmless = Fault(key="z2", what="", inject=id)
    for found in (
        Outcome(error=IntegrityError("weights", "a", "b")),
        Outcome(delta=float("nan"), same_draws=True),
        Outcome(delta=0.1, same_draws=True),
        Outcome(delta=0.0),
        Outcome(delta=0.0, same_draws=True, warned=("something",)),
    ):
        assert len(harmless.complaints(case, found)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such permissions")
def test_permissions_are_obeyed_by_root_too(tmp_path: Path) -> None:
    """Within the body only: a file that is closed to all cannot be read."""
    (tmp_path / "file").touch(mode=0)
    with permissions_obeyed(), pytest.raises(PermissionError):
        (tmp_path / "file").read_bytes()


def test_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a row for each fault, and what they add up to; nothing is broken."""
    monkeypatch.setattr(sys, "argv", ["faults", "--quick"])
    assert faults.main() == 0
    printed = capsys.readouterr().out
    keys = [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines()]
    expected = [fault.key for fault in faults.first_of_each_kind()]
    assert [key for key in keys if key in expected] == expected
    assert "Of peftstate's errors, 0 are another library's" in printed
