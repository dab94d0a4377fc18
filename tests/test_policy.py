"""What is done about differences: `on_mismatch`."""

from __future__ import annotations

import re
import warnings
from typing import Any, get_args

import pytest

from peftstate._diff import Mismatch
from peftstate._policy import Action, Policy
from peftstate._report import Report
from peftstate.errors import (
    DtypeMismatchError,
    EnvironmentMismatchError,
    RngMismatchError,
    StateMismatchWarning,
)
from peftstate.sections import SECTIONS

NAMES = [section.name for section in SECTIONS]
DTYPE = Mismatch("dtype", "base.default", "float32", "bfloat16")
ENVIRONMENT = Mismatch("environment", "python", "3.11.1", "3.12.1")
RNG = Mismatch("rng", "torch_cpu", 1, 2)
DEVICE = Mismatch("rng", "accelerators[cuda:1].digest", 1, 2)
REPORT = Report((DTYPE, ENVIRONMENT, DEVICE), ("dtype", "environment", "rng"))


@pytest.mark.parametrize(
    ("field", "action"),
    [
        ("quantization.method", "error"),
        ("base_model.tensors[model.norm.weight].digest", "error"),
        ("dtype.base.default", "error"),
        ("adapters.adapters.default.config.r", "error"),
        ("implementation.attention[]", "error"),
        ("implementation.autocast", "error"),
        ("implementation.hooks[model.norm]", "warn"),
        ("implementation.kernels.LlamaMLP", "warn"),
        ("training.base.train.default", "error"),
        ("generation.config.temperature", "error"),
        ("rng.torch_cpu.digest", "error"),
        ("rng.accelerators", "warn"),
        ("rng.accelerators[cuda:0]", "warn"),
        ("rng.accelerators[cuda:0].digest", "warn"),
        ("environment.python", "warn"),
        ("environment.packages.torch", "warn"),
        ("runtime.tf32", "warn"),
    ],
)
def test_by_default(field: str, action: Action) -> None:
    """What cannot be restored here warns by default; everything else is an error."""
    section, _, rest = field.partition(".")
    assert Policy.of(None).action(Mismatch(section, rest, 1, 2)) == action
    assert Policy.of({}).action(Mismatch(section, rest, 1, 2)) == action
    assert Policy.of(None).handles(section)


@pytest.mark.parametrize("action", get_args(Action))
def test_for_all(action: Action) -> None:
    """One word is for every section, also for those that warn by default."""
    policy = Policy.of(action)
    for section in NAMES:
        assert policy.action(Mismatch(section, "field", 1, 2)) == action
        assert policy.handles(section) == (action != "ignore")
    assert policy.action(DEVICE) == action


def test_by_section() -> None:
    """A mapping is for the sections that it names; the others keep their defaults."""
    policy = Policy.of({"dtype": "warn", "rng": "ignore", "environment": "error"})
    assert policy.action(DTYPE) == "warn"
    assert policy.action(RNG) == policy.action(DEVICE) == "ignore"
    assert policy.action(ENVIRONMENT) == "error"
    assert policy.action(Mismatch("training", "x", 1, 2)) == "error"
    assert [name for name in NAMES if not policy.handles(name)] == ["rng"]


def test_chosen_error() -> None:
    """Who asks for an error of a section gets it also for devices that are not here."""
    assert Policy.of({"rng": "error"}).action(DEVICE) == "error"


@pytest.mark.parametrize(
    ("on_mismatch", "message"),
    [
        ("raise", "on_mismatch: 'raise' is none of ('error', 'warn', 'ignore')"),
        ("", "on_mismatch: '' is none of ('error', 'warn', 'ignore')"),
        ({"rng": "skip"}, "on_mismatch: 'skip' is none of ('error', 'warn', 'ignore')"),
        ({"rng": None}, "on_mismatch: None is none of ('error', 'warn', 'ignore')"),
        ({"random": "warn"}, f"on_mismatch: there is no section 'random'; there are {NAMES}"),
        ({"files": "ignore"}, f"on_mismatch: there is no section 'files'; there are {NAMES}"),
    ],
)
def test_refused(on_mismatch: Any, message: str) -> None:
    """A word or a section that does not exist is refused, with those that do."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Policy.of(on_mismatch)


def test_apply_error() -> None:
    """What is an error is raised, all of it in one; what only warns is not in it."""
    with pytest.raises(DtypeMismatchError) as caught:
        Policy.of(None).apply(REPORT)
    assert caught.value.mismatches == (DTYPE,)
    with pytest.raises(DtypeMismatchError) as caught:
        Policy.of("error").apply(REPORT)
    assert caught.value.mismatches == REPORT.mismatches


def test_apply_error_of_a_later_section() -> None:
    """The class of the error is that of the first section that is an error."""
    with pytest.raises(RngMismatchError) as caught:
        Policy.of({"dtype": "ignore"}).apply(Report((DTYPE, ENVIRONMENT, RNG), REPORT.sections))
    assert caught.value.mismatches == (RNG,)
    assert caught.value.report.sections == REPORT.sections
    with pytest.raises(EnvironmentMismatchError):
        Policy.of({"dtype": "warn", "environment": "error"}).apply(REPORT)


def test_apply_warning() -> None:
    """What is no error is one warning, at the line of the caller."""
    with pytest.warns(StateMismatchWarning) as caught:
        Policy.of({"dtype": "warn"}).apply(REPORT)
    (warning,) = caught
    assert str(warning.message) == (
        "The loaded model differs from the saved state:\n"
        "  dtype.base.default: saved 'float32', found 'bfloat16'\n"
        "  environment.python: saved '3.11.1', found '3.12.1'\n"
        "  rng.accelerators[cuda:1].digest: saved 1, found 2"
    )
    assert warning.filename == __file__


def test_apply_ignore() -> None:
    """What is ignored is silent, and so is a report of no difference."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Policy.of("ignore").apply(REPORT)
        Policy.of("error").apply(Report((), ("dtype",)))
