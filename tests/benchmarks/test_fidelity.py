"""The benchmark of fidelity: how it judges a reload, and the page that it writes."""

from __future__ import annotations

import re

import attrs
import pytest
import torch

from benchmarks._page import DOCS
from benchmarks.fidelity.__main__ import main, measure, quick
from benchmarks.fidelity._compare import difference
from benchmarks.fidelity._libraries import PEFTSTATE
from benchmarks.fidelity._models import V4, Place, logits
from benchmarks.fidelity._outcome import EXACT, Kind, refused, told
from benchmarks.fidelity._run import run
from benchmarks.fidelity._situation import Situation
from benchmarks.fidelity._tables import tables
from benchmarks.fidelity.situations import CAUSES, FURTHER, OF_CAUSES
from peftstate.errors import AdapterMismatchError, IntegrityError


def situation(cause: str, number: int = 0) -> Situation:
    """One of the situations of a cause."""
    return [each for each in OF_CAUSES if each.cause == cause][number]


def page_rows(name: str) -> list[list[str]]:
    """The cells of a table on the page."""
    text = (DOCS / "fidelity.md").read_text(encoding="utf-8")
    block = re.search(f"<!-- begin: {name} -->(.*?)<!-- end: {name} -->", text, re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_page_has_a_row_for_every_cause_and_situation():
    """The page is that of the situations there are."""
    rows = page_rows("fidelity-causes")
    assert [row[0].partition(" ")[0] for row in rows if row[0]] == list(CAUSES)
    assert [row[1] for row in rows] == [each.title for each in OF_CAUSES]
    assert [row[0] for row in page_rows("fidelity-further")] == [each.title for each in FURTHER]


@pytest.mark.skipif(V4, reason="the page is of the newest versions")
def test_page_says_of_ours_what_is_expected():
    """No reload with peftstate differs silently; an error is the one of the definition."""
    rows = [*page_rows("fidelity-causes"), *page_rows("fidelity-further")]
    for row, each in zip(rows, (*OF_CAUSES, *FURTHER), strict=True):
        expected = {
            Kind.EXACT: "exact",
            Kind.TOLD: "`StateMismatchWarning`",
            Kind.REFUSED: f"`{getattr(each.ours.category, '__name__', None)}`",
        }[each.ours.kind]
        assert row[-1].startswith(expected), each.id
    counts = {row[0]: row[1:] for row in page_rows("fidelity")}
    assert [counts["differs silently"][column] for column in (1, 3)] == ["0", "0"]


def test_quick_run(capsys, monkeypatch):
    """A few situations are run with both libraries, and each of ours is as it should be."""
    monkeypatch.setattr("sys.argv", ["fidelity", "--quick"])
    threads = torch.get_num_threads()
    try:
        assert main() == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "situations of 6 causes" in printed
    assert all(each.title in printed for each in quick())


def test_outcomes_of_one_run(tmp_path):
    """One run tells silence, a warning, a crash and a typed error from an exact reload."""
    chosen = [situation("A3"), situation("A1"), situation("A5", 1), situation("B2")]
    rows = list(measure(chosen))
    assert [row.peft.kind for row in rows] == [
        Kind.SILENT,
        Kind.TOLD,
        Kind.CRASHED,
        Kind.EXACT,
    ]
    assert [row.ours.kind for row in rows] == [Kind.EXACT, Kind.REFUSED, Kind.EXACT, Kind.EXACT]
    counts = {row[0]: row[1:3] for row in tables(rows)[0].rows}
    assert counts["differs silently"] == ["1", "0"]
    assert counts["exact"] == ["1", "3"]
    assert counts["situations"] == ["4", "4"]


def test_a_reload_that_differs_silently_is_a_problem(tmp_path):
    """If peftstate gave another model without a word, the run would fail."""

    def lossy(library, model, folder):
        library.save(model, folder)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1)

    broken = attrs.evolve(situation("B4"), base=Place.load, save=lossy)
    (outcome,) = run(broken, Place(tmp_path), [PEFTSTATE])
    assert outcome.kind is Kind.SILENT
    assert "differs silently" in (EXACT.problem(outcome) or "")


def test_a_warning_counts_only_if_it_names_the_difference(tmp_path):
    """Another warning than the one that the definition knows leaves the difference silent."""
    known = situation("A1")
    unknown = attrs.evolve(known, names="something else")
    place = Place(tmp_path)
    assert run(known, place)[0].kind is Kind.TOLD
    assert run(unknown, place)[0].kind is Kind.SILENT


@pytest.mark.parametrize(
    "expected",
    [
        EXACT,
        told("adapter_model"),
        refused(AdapterMismatchError, ""),
        refused(IntegrityError, "x!"),
    ],
)
def test_an_error_must_be_the_expected_one(tmp_path, expected):
    """Another class, or another text, is a problem."""
    known = situation("C9")
    _, outcome = run(known, Place(tmp_path))
    assert known.ours.problem(outcome) is None
    assert expected.problem(outcome) is not None


@pytest.mark.skipif(V4, reason="PEFT cannot load this with transformers 4")
def test_unexpected_warning_is_a_problem(tmp_path):
    """An exact reload with a warning is exact, and yet not what was expected."""
    known = situation("F4")
    _, outcome = run(known, Place(tmp_path))
    assert known.ours.problem(outcome) is None
    assert "cannot be read" in (EXACT.problem(outcome) or "")


@pytest.mark.parametrize(
    ("saved", "found", "text"),
    [
        (torch.ones(2), torch.ones(2), ""),
        (torch.ones(2), torch.tensor([1.0, 1.5]), "max |Δ x| 0.5"),
        (torch.ones(2), torch.tensor([1.0, float("nan")]), "max |Δ x| nan"),
        (torch.ones(2), torch.ones(2).bfloat16(), "x in float32 → bfloat16"),
        (torch.ones(2), torch.ones(3), "x of shape (2,) → (3,)"),
        (torch.tensor([1]), torch.tensor([2]), "other x"),
        (("a", "b"), ("a",), "x: 2 → 1"),
        (0, False, "x: 0 → False"),
        ("left", "", "x: left → none"),
    ],
)
def test_difference(saved, found, text):
    """Bits, dtypes and shapes all count, and the words fit into a table."""
    differs = difference({"x": saved}, {"x": found})
    assert ("" if differs is None else differs.text) == text
    assert differs is None or differs.is_computed is isinstance(saved, torch.Tensor)


def test_difference_of_several_values():
    """Numbers come first, and what is too much is counted."""
    saved = {"a": 1, "b": 2, "c": 3, "logits": torch.zeros(1)}
    found = {"a": 9, "b": 9, "logits": torch.ones(1)}
    assert str(difference(saved, found)) == "max |Δ logits| 1, a: 1 → 9, and 2 more"


def test_answers_are_given_in_eval_mode(tmp_path):
    """What is compared has no dropout in it."""
    model = situation("B4").build(Place(tmp_path))
    assert model.training
    assert torch.equal(logits(model)["logits"], logits(model)["logits"])
