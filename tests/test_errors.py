"""The errors and warnings: what they say, what they carry, and that they survive a pickle."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

from peftstate import errors
from peftstate._diff import ABSENT, Mismatch
from peftstate._report import Report

DTYPE = Mismatch("dtype", "base.default", "float32", "bfloat16")
RNG = Mismatch("rng", "torch_cpu", ABSENT, 1)
REPORT = Report((DTYPE, RNG), ("dtype", "training", "rng"))
DIFFERING = (
    "2 values differ from the saved state:\n"
    "  dtype.base.default: saved 'float32', found 'bfloat16'\n"
    "  rng.torch_cpu: saved absent, found 1\n"
)
RESTORE = "Restore the saved state with peftstate.restore(model, path).\n"
HINT = 'To load all the same, pass on_mismatch={"dtype": "warn", "rng": "warn"}.'

CASES: list[tuple[errors.PeftStateError, str, dict[str, Any]]] = [
    (errors.PeftStateError("text"), "text", {}),
    (errors.ManifestError("a/b.json", "is odd."), "a/b.json: is odd.", {"path": "a/b.json"}),
    (
        errors.ManifestNotFoundError("a/b.json"),
        (
            "a/b.json: there is no peftstate manifest, so nothing of this adapter's state can be "
            "verified or restored. Save the model with peftstate, or load it with "
            "require_manifest=False."
        ),
        {"path": "a/b.json"},
    ),
    (
        errors.ManifestExistsError("a/b.json"),
        (
            "a/b.json: there is a peftstate manifest already, so there is nothing to adopt. Load "
            "the adapter with peftstate; or, to describe it anew by a plain load, remove that file "
            "first."
        ),
        {"path": "a/b.json"},
    ),
    (
        errors.ManifestDecodeError("a", "is missing", field="sections.rng.numpy"),
        "a: sections.rng.numpy: is missing",
        {"path": "a", "field": "sections.rng.numpy"},
    ),
    (
        errors.ManifestDecodeError("a", "not UTF-8 JSON"),
        "a: not UTF-8 JSON",
        {"path": "a", "field": ""},
    ),
    (
        errors.SchemaVersionError("a", found=7, supported=3),
        (
            "a: the manifest has schema version 7, this peftstate reads 1 to 3. "
            "Upgrade peftstate to load it."
        ),
        {"path": "a", "found": 7, "supported": 3},
    ),
    (
        errors.IntegrityError("a/w.bin", "3 bytes", "4 bytes"),
        (
            "a/w.bin: saved 3 bytes, found 4 bytes. "
            "The file changed after it was saved: restore it from a copy, or save again."
        ),
        {"file": "a/w.bin", "expected": "3 bytes", "actual": "4 bytes"},
    ),
    (
        errors.NotCachedError("a/w.bin", "3 bytes", errors.NotCachedError.absent),
        (
            "a/w.bin: saved 3 bytes, found no file in the Hub's cache. "
            "Load it once with the Hub in reach; if it is missing there, push it again."
        ),
        {"file": "a/w.bin", "expected": "3 bytes", "actual": "no file in the Hub's cache"},
    ),
    (
        errors.AdapterNotFoundError("a/b", "the Hub's cache holds no repo of that name"),
        "a/b: there is no such folder; the Hub's cache holds no repo of that name.",
        {"name": "a/b", "reason": "the Hub's cache holds no repo of that name"},
    ),
    (
        errors.UnreadableFileError("a/w.bin", "Permission denied"),
        (
            "a/w.bin: saved a file, found one that cannot be read (Permission denied). "
            "Let this process read it, or restore it from a copy."
        ),
        {
            "file": "a/w.bin",
            "expected": "a file",
            "actual": "one that cannot be read (Permission denied)",
        },
    ),
    (
        errors.SignatureError("a/model.sig", "there is no signature."),
        "a/model.sig: there is no signature.",
        {"path": "a/model.sig", "reason": "there is no signature."},
    ),
    (
        errors.NotServableError("a", "adapters.enabled", "it is off."),
        "a: adapters.enabled: it is off.",
        {"path": "a", "field": "adapters.enabled", "reason": "it is off."},
    ),
    (
        errors.EngineMismatchError("a", REPORT),
        "a: "
        + DIFFERING
        + "Start the engine as `peftstate vllm-args` says, or load an adapter that fits this one.",
        {"path": "a", "report": REPORT},
    ),
    (
        errors.ServerError("http://a/v1", "it cannot be reached."),
        "http://a/v1: it cannot be reached.",
        {"url": "http://a/v1", "reason": "it cannot be reached."},
    ),
    (
        errors.SaveError("The disk is full."),
        "The disk is full. No old file was replaced.",
        {"rescued": None},
    ),
    (
        errors.SaveError("It cannot be.", rescued="a.rescued-0"),
        "It cannot be. No old file was replaced. What could be saved is in a.rescued-0.",
        {"rescued": "a.rescued-0"},
    ),
    (
        errors.RestoreError("rng", "the state does not fit"),
        "rng: the state does not fit",
        {"section": "rng"},
    ),
    (
        errors.AdapterLoadError("adapters", "PEFT does not take its config"),
        "adapters: PEFT does not take its config",
        {"section": "adapters"},
    ),
    (errors.StateMismatchError(REPORT), DIFFERING + RESTORE.rstrip(), {}),
    (
        errors.BaseModelMismatchError(REPORT),
        DIFFERING
        + "Load the base model that the adapter was trained on, at the same revision.\n"
        + HINT,
        {"section": "base_model"},
    ),
    (
        errors.QuantizationMismatchError(REPORT),
        DIFFERING
        + "Load the base model with from_pretrained(…, **peftstate.base_model_kwargs(path)), "
        "or load everything with peftstate.AutoPeftModelFor….from_pretrained(path).\n" + HINT,
        {"section": "quantization"},
    ),
    (
        errors.DtypeMismatchError(REPORT),
        DIFFERING
        + "Load the base model with from_pretrained(…, **peftstate.base_model_kwargs(path)).\n"
        + HINT,
        {"section": "dtype"},
    ),
    (
        errors.AdapterMismatchError(REPORT),
        DIFFERING + "Restore the adapter's files from a copy, or save the adapter again.\n" + HINT,
        {"section": "adapters"},
    ),
    (
        errors.ImplementationMismatchError(REPORT),
        DIFFERING + "Install the kernels of the saved implementation.\n" + HINT,
        {"section": "implementation"},
    ),
    (
        errors.TrainingStateMismatchError(REPORT),
        DIFFERING + RESTORE + HINT,
        {"section": "training"},
    ),
    (
        errors.GenerationConfigMismatchError(REPORT),
        DIFFERING + RESTORE + HINT,
        {"section": "generation"},
    ),
    (
        errors.TokenizerMismatchError(REPORT),
        DIFFERING + "Load the tokenizer that was saved with the adapter.\n" + HINT,
        {"section": "tokenizer"},
    ),
    (
        errors.RuntimeMismatchError(REPORT),
        DIFFERING + "Set them as saved, or run inside peftstate.reproducible(model).\n" + HINT,
        {"section": "runtime"},
    ),
    (
        errors.EnvironmentMismatchError(REPORT),
        DIFFERING
        + "Install the saved versions for results that are equal to the last bit.\n"
        + HINT,
        {"section": "environment"},
    ),
    (errors.RngMismatchError(REPORT), DIFFERING + RESTORE + HINT, {"section": "rng"}),
    (
        errors.PredictionMismatchError(REPORT),
        DIFFERING
        + "Compare the reports of peftstate.verify(model, path) in both environments.\n"
        + HINT,
        {"section": "predictions"},
    ),
]
"""Of every class: an instance, its text, and what else it carries."""

WARNINGS = [
    errors.PeftStateWarning,
    errors.MissingManifestWarning,
    errors.StateMismatchWarning,
    errors.MergedWeightsWarning,
    errors.TrainModeWarning,
    errors.UnfinishedSaveWarning,
    errors.UnverifiedWarning,
    errors.RankStateWarning,
]


def test_every_class() -> None:
    """No class of the module is missing from the cases below."""
    defined = {
        item
        for item in vars(errors).values()
        if inspect.isclass(item) and item.__module__ == errors.__name__
    }
    assert defined == {type(error) for error, _, _ in CASES} | set(WARNINGS)


@pytest.mark.parametrize(("error", "text", "attributes"), CASES)
def test_text(error: errors.PeftStateError, text: str, attributes: dict[str, Any]) -> None:
    """An error says what was saved, what was found and what to do, and carries it as values."""
    assert str(error) == text
    for name, value in attributes.items():
        assert getattr(error, name) == value


def _pickled(error: Any) -> Any:
    """What another process gets."""
    return pickle.loads(pickle.dumps(error))  # noqa: S301


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, _pickled])
@pytest.mark.parametrize(("error", "text", "attributes"), CASES)
def test_pickle(
    error: errors.PeftStateError, text: str, attributes: dict[str, Any], again: Any
) -> None:
    """An error comes back from another process as it was."""
    error.add_note("from rank 1")
    returned = again(error)
    assert type(returned) is type(error)
    assert str(returned) == text
    assert vars(returned) == vars(error)
    assert vars(returned).keys() >= attributes.keys() - {"section"}
    assert returned.__notes__ == error.__notes__


def test_mismatches() -> None:
    """A mismatch error holds the report, and every mismatch of it."""
    error = errors.DtypeMismatchError(REPORT)
    assert error.report is REPORT
    assert error.mismatches == (DTYPE, RNG)
    assert _pickled(error).report == REPORT
    assert errors.EngineMismatchError("a", REPORT).mismatches == (DTYPE, RNG)


def test_one_mismatch() -> None:
    """The text of a single mismatch is in the singular."""
    assert str(errors.RngMismatchError(Report((RNG,), ("rng",)))) == (
        "1 value differs from the saved state:\n"
        "  rng.torch_cpu: saved absent, found 1\n"
        "Restore the saved state with peftstate.restore(model, path).\n"
        'To load all the same, pass on_mismatch={"rng": "warn"}.'
    )


def test_many_mismatches() -> None:
    """Of many mismatches the first are listed, the rest are counted; the hint is for all."""
    many = tuple(Mismatch("dtype", f"f{number}", 1, 2) for number in range(13))
    error = errors.DtypeMismatchError(Report((*many, RNG), ("dtype", "rng")))
    lines = str(error).splitlines()
    assert lines[0] == "14 values differ from the saved state:"
    assert lines[1:13] == [f"  dtype.f{number}: saved 1, found 2" for number in range(12)]
    assert lines[13] == "  … and 2 more"
    assert lines[15] == HINT
    assert error.mismatches == (*many, RNG)


def test_tree() -> None:
    """What is caught by which clause."""
    for error, _, _ in CASES:
        assert isinstance(error, errors.PeftStateError)
    for cls in (
        errors.ManifestNotFoundError,
        errors.ManifestDecodeError,
        errors.SchemaVersionError,
    ):
        assert issubclass(cls, errors.ManifestError)
    assert issubclass(errors.ManifestNotFoundError, FileNotFoundError)
    assert issubclass(errors.ManifestDecodeError, ValueError)
    assert issubclass(errors.UnreadableFileError, errors.IntegrityError)
    assert issubclass(errors.NotCachedError, errors.IntegrityError)
    assert issubclass(errors.AdapterNotFoundError, (FileNotFoundError, ValueError))
    for other in (
        errors.IntegrityError,
        errors.SignatureError,
        errors.SaveError,
        errors.RestoreError,
    ):
        assert not issubclass(other, (errors.ManifestError, errors.StateMismatchError, OSError))
    sections = [cls.section for cls in errors.StateMismatchError.__subclasses__()]
    assert len(set(sections)) == len(sections) == 12


@pytest.mark.parametrize("warning", WARNINGS)
def test_warnings(warning: type[Warning]) -> None:
    """All warnings can be filtered at once, and are shown by default."""
    assert issubclass(warning, errors.PeftStateWarning)
    assert issubclass(warning, UserWarning)
