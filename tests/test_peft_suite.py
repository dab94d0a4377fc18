"""The harness that runs PEFT's tests with our classes tells a difference from none."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.peft_suite import run
from tests.peft_suite.differences import DIFFERENCES, QUICK, UNUSABLE, Difference
from tests.peft_suite.plugin import _View
from tests.peft_suite.run import Outcome, Result

PASSED = Outcome("passed", "")
FAILED = Outcome("failed", "E   assert False")
REFUSED = Outcome("failed", "E   peftstate.errors.BaseModelMismatchError: 1 value differs")


@attrs.define
class Played:
    """A suite whose outcomes are given, one after the other for each test that is run again."""

    theirs: dict[str, list[Outcome]]
    ours: dict[str, list[Outcome]]

    def run(
        self,
        classes: str,
        _tests: Mapping[str, str],
        *,
        only: Collection[str] | None = None,
        **_: Any,
    ) -> dict[str, Outcome]:
        """The next outcome of each test."""
        outcomes = self.theirs if classes == "peft" else self.ours
        names = [name for name in outcomes if only is None or name in only]
        return {name: outcomes[name].pop(0) for name in names}


def result(theirs: dict[str, list[Outcome]], ours: dict[str, list[Outcome]]) -> Result:
    """The result of a suite with these outcomes."""
    made = Result("peftstate")
    suite: Any = Played(theirs, ours)
    made.run(suite, {"test_x.py": ""})
    return made


def test_what_passes_with_both_is_no_difference():
    """Nothing is wrong, nothing runs twice, and what fails with PEFT's classes is not run."""
    made = result({"a": [PASSED], "b": [FAILED]}, {"a": [PASSED], "b": []})
    assert (made.passed(), made.failed(), run.report(made)) == (["a"], [], [])


def test_what_passes_with_pefts_classes_only_is_wrong():
    """A test that fails twice with ours, and passes twice with PEFT's, is named."""
    made = result({"tests/x.py::a": [PASSED, PASSED]}, {"tests/x.py::a": [FAILED, FAILED]})
    assert run.report(made) == ["tests/x.py::a passes with PEFT's classes only"]


def test_what_did_not_run_is_wrong():
    """A test that is lost with our classes is a difference like any other."""
    made = result({"a": [PASSED, PASSED]}, {})
    assert made.reason("a") == "it did not run"
    assert len(run.report(made)) == 1


def test_what_fails_by_chance_is_no_difference():
    """A test that passes when it is run again, or then fails with PEFT's classes, is let be."""
    theirs = {"a": [PASSED, PASSED], "b": [PASSED, FAILED]}
    made = result(theirs, {"a": [FAILED, PASSED], "b": [FAILED, FAILED]})
    assert run.report(made) == []


def test_another_base_model_is_no_difference_if_the_test_passes_once_it_is_allowed():
    """Such a refusal is counted apart, and nothing may hide behind it."""
    theirs = {name: [PASSED, PASSED] for name in ("a", "b")}
    made = result(theirs, {"a": [REFUSED, PASSED], "b": [REFUSED, FAILED]})
    assert made.refused == {"a"}
    assert made.failed() == ["b"]


def test_a_known_difference_must_fail_as_it_is_known_to(monkeypatch):
    """With another error it is wrong, and so it is if it passes."""
    monkeypatch.setattr(run, "DIFFERENCES", (Difference("x::", "assert False", "a reason"),))
    made = result(
        {f"x::{name}": [PASSED, PASSED] for name in "abc"},
        {"x::a": [FAILED, FAILED], "x::b": [REFUSED, REFUSED], "x::c": [PASSED]},
    )
    assert list(made.expected()) == ["x::a"]
    assert run.report(made) == [
        "x::b passes with PEFT's classes only",
        "x::c passes, and differences.py expects that it fails",
    ]


def test_the_selection_can_be_compiled():
    """Patterns are regular expressions, and no file runs in the selection that cannot."""
    for difference in DIFFERENCES:
        re.compile(difference.pattern)
        re.compile(difference.error)
        assert difference.reason.endswith(".")
    for pattern in QUICK.values():
        re.compile(pattern)
    assert not QUICK.keys() & set(UNUSABLE)


def test_a_view_replaces_names_for_its_readers_only():
    """The module behind a view stays as it is, but for what is set through it."""
    module = types.ModuleType("module")
    module.__file__, module.__path__ = __file__, [str(Path(__file__).parent)]
    vars(module).update(kept=1, replaced=2)
    view = _View(module, {"replaced": 3})
    assert (view.kept, view.replaced) == (1, 3)
    view.kept, view.replaced = 4, 5
    assert (view.kept, view.replaced) == (4, 5)
    assert (vars(module)["kept"], vars(module)["replaced"]) == (4, 2)
    del view.kept
    with pytest.raises(AttributeError):
        _ = view.kept
