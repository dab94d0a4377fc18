"""The outcome of a comparison."""

from __future__ import annotations

import pickle
from typing import Any

import attrs
import pytest

from peftstate import errors
from peftstate._diff import Mismatch
from peftstate._report import Report
from peftstate.sections import SECTIONS

DTYPE = Mismatch("dtype", "base.default", "float32", "bfloat16")
RNG = Mismatch("rng", "numpy.position", 1, 2)
REPORT = Report((DTYPE, RNG), ("dtype", "training", "rng"))
SAME = Report((), ("dtype", "rng"))


def test_ok() -> None:
    """A report is in order if nothing differs."""
    assert SAME.ok
    assert not REPORT.ok


def test_of() -> None:
    """A part of a report holds the sections that were asked for, and compared."""
    assert REPORT.of("rng") == Report((RNG,), ("rng",))
    assert REPORT.of("rng", "dtype") == Report((DTYPE, RNG), ("dtype", "rng"))
    assert REPORT.of("training") == Report((), ("training",))
    assert REPORT.of("generation") == REPORT.of() == Report((), ())


def test_text() -> None:
    """A report has a line for each section, and one for each mismatch below it."""
    assert str(REPORT) == (
        "dtype     differs\n"
        "  dtype.base.default: saved 'float32', found 'bfloat16'\n"
        "training  ok\n"
        "rng       differs\n"
        "  rng.numpy.position: saved 1, found 2"
    )
    assert str(SAME) == "dtype  ok\nrng    ok"
    assert str(Report((), ())) == ""


def test_notes() -> None:
    """A note is shown after all else, and is no difference."""
    report = Report((), ("files",), ("not covered by the manifest: a.txt",))
    assert report.ok
    report.raise_for_mismatch()
    assert str(report) == "files  ok\nnote: not covered by the manifest: a.txt"
    assert report.of("files") == Report((), ("files",))


def test_raise_for_mismatch() -> None:
    """The class of the error is that of the first section that differs; all else is in it."""
    with pytest.raises(errors.DtypeMismatchError) as caught:
        REPORT.raise_for_mismatch()
    assert caught.value.report is REPORT
    assert caught.value.mismatches == (DTYPE, RNG)
    with pytest.raises(errors.RngMismatchError):
        REPORT.of("rng").raise_for_mismatch()


def test_raise_for_nothing() -> None:
    """Nothing is raised if nothing differs."""
    SAME.raise_for_mismatch()
    REPORT.of("training").raise_for_mismatch()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_error_of_each_section(section: Any) -> None:
    """A difference raises what its section says."""
    report = Report((Mismatch(section.name, "field", 1, 2),), (section.name,))
    assert type(report.error()) is section.error
    assert f'on_mismatch={{"{section.name}": "warn"}}' in str(report.error())


def test_error_of_no_section() -> None:
    """What is no section raises the general error, which nothing can switch off."""
    report = Report((Mismatch("nothing", "[a].size", 1, 2),), ("nothing",))
    assert type(report.error()) is errors.StateMismatchError
    assert "on_mismatch" not in str(report.error())


def test_value() -> None:
    """A report is a value: equal to one of the same content, pickled, and not to be changed."""
    assert pickle.loads(pickle.dumps(REPORT)) == REPORT  # noqa: S301
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        REPORT.mismatches = ()  # type: ignore[misc]


def test_damaged_files_are_an_integrity_error() -> None:
    """A report of `verify_files` raises `IntegrityError`, which names the first file."""
    report = Report((Mismatch("files", "[a.b].size", 1, 2),), ("files",))
    with pytest.raises(errors.IntegrityError) as caught:
        report.raise_for_mismatch()
    assert (caught.value.file, caught.value.expected, caught.value.actual) == ("a.b", "1", "2")
