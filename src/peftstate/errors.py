"""The errors and warnings of peftstate.

PeftStateError
├─ AdapterNotFoundError             .name .reason; also FileNotFoundError, ValueError
├─ ManifestError                    .path
│  ├─ ManifestNotFoundError         also FileNotFoundError
│  ├─ ManifestExistsError           also FileExistsError
│  ├─ ManifestDecodeError           also ValueError; .field
│  └─ SchemaVersionError            .found .supported
├─ IntegrityError                   .file .expected .actual
│  ├─ NotCachedError
│  └─ UnreadableFileError
├─ SignatureError                   .path .reason
├─ NotServableError                 .path .field .reason
├─ EngineMismatchError              .path .mismatches .report
├─ ServerError                      .url .reason; also OSError
├─ SaveError                        .rescued
├─ RestoreError                     .section
│  └─ AdapterLoadError              also ValueError, RuntimeError
└─ StateMismatchError               .mismatches .report
   ├─ BaseModelMismatchError        ├─ QuantizationMismatchError
   ├─ DtypeMismatchError            ├─ AdapterMismatchError
   ├─ ImplementationMismatchError   ├─ TrainingStateMismatchError
   ├─ GenerationConfigMismatchError ├─ TokenizerMismatchError
   ├─ RuntimeMismatchError          ├─ EnvironmentMismatchError
   ├─ RngMismatchError              └─ PredictionMismatchError

PeftStateWarning
├─ MissingManifestWarning
├─ StateMismatchWarning
├─ TrainModeWarning
├─ UnverifiedWarning
├─ MergedWeightsWarning
└─ UnfinishedSaveWarning
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from peftstate._diff import printable

if TYPE_CHECKING:
    from peftstate._diff import Mismatch
    from peftstate._report import Report

_SHOWN = 12
"""Mismatches that a message lists before it only counts the rest."""


def _rebuild(cls: type[PeftStateError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    """Make an error again from its pickled parts, without running its `__init__`."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class PeftStateError(Exception):
    """The base of every error that peftstate raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


class AdapterNotFoundError(PeftStateError, FileNotFoundError, ValueError):
    """There is neither such a folder nor, as far as can be seen, such a repo; the cause is chained.

    It is a `ValueError` too, which PEFT itself raises then. What the Hub refuses (there is no such
    repo, no such revision, no access) is the error of `huggingface_hub` that says so.

    Attributes:
        name: What was asked for.
        reason: Why it is not to be had from the Hub or from the Hub's cache.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{printable(name)}: there is no such folder; {reason}.")
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class ManifestError(PeftStateError):
    """A manifest cannot be used.

    Attributes:
        path: The manifest's path, or the repo id and name.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class ManifestNotFoundError(ManifestError, FileNotFoundError):
    """There is no manifest where one was required."""

    def __init__(self, path: str) -> None:
        super().__init__(
            path,
            "there is no peftstate manifest, so nothing of this adapter's state can be verified or "
            "restored. Save the model with peftstate, or load it with require_manifest=False.",
        )

    def __str__(self) -> str:
        return str(self.args[0])


class ManifestExistsError(ManifestError, FileExistsError):
    """There is a manifest already, so the adapter is not one that was made without peftstate."""

    def __init__(self, path: str) -> None:
        super().__init__(
            path,
            "there is a peftstate manifest already, so there is nothing to adopt. Load the adapter "
            "with peftstate; or, to describe it anew by a plain load, remove that file first.",
        )

    def __str__(self) -> str:
        return str(self.args[0])


class ManifestDecodeError(ManifestError, ValueError):
    """A manifest is not what the format allows.

    Attributes:
        field: Path of the offending value, such as ``"sections.rng.torch_cuda[1]"``, or ``""``.
    """

    def __init__(self, path: str, message: str, *, field: str = "") -> None:
        super().__init__(path, f"{field}: {message}" if field else message)
        self.field = field


class SchemaVersionError(ManifestError):
    """A manifest was written in a schema that this version does not know.

    Attributes:
        found: The schema version of the manifest.
        supported: The newest schema version that is understood.
    """

    def __init__(self, path: str, *, found: int, supported: int) -> None:
        super().__init__(
            path,
            f"the manifest has schema version {found}, this peftstate reads 1 to {supported}. "
            "Upgrade peftstate to load it.",
        )
        self.found = found
        self.supported = supported


class IntegrityError(PeftStateError):
    """The bytes on disk are not the bytes that were saved, as far as they can be read.

    Attributes:
        file: The file, or the file and the tensor in it.
        expected: What the manifest says.
        actual: What is there.
    """

    absent: ClassVar[str] = "no file"
    remedy: ClassVar[str] = (
        "The file changed after it was saved: restore it from a copy, or save again."
    )

    def __init__(self, file: str, expected: str, actual: str) -> None:
        super().__init__(f"{file}: saved {expected}, found {actual}. {self.remedy}")
        self.file = file
        self.expected = expected
        self.actual = actual


class SignatureError(PeftStateError):
    """A folder is not as somebody signed it whose key is trusted, or nobody has signed it.

    Attributes:
        path: The signature file, or the file that it does not fit or does not cover.
        reason: What is wrong, and what to do.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{printable(path)}: {reason}")
        self.path = path
        self.reason = reason


class NotCachedError(IntegrityError):
    """The Hub's cache has an adapter's manifest but not all files that the manifest describes."""

    absent = "no file in the Hub's cache"
    remedy = "Load it once with the Hub in reach; if it is missing there, push it again."


class UnreadableFileError(IntegrityError):
    """A file is there, but the system does not let this process read it; the cause is chained."""

    remedy = "Let this process read it, or restore it from a copy."

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, "a file", f"one that cannot be read ({reason})")


class NotServableError(PeftStateError):
    """A serving engine cannot compute what the manifest says.

    Attributes:
        path: The adapter.
        field: The field of the manifest, such as ``"adapters.adapters.default.config.use_dora"``.
        reason: What the engine lacks, and what to do.
    """

    def __init__(self, path: str, field: str, reason: str) -> None:
        super().__init__(f"{printable(path)}: {printable(field)}: {reason}")
        self.path = path
        self.field = field
        self.reason = reason


class EngineMismatchError(PeftStateError):
    """A serving engine is set up otherwise than the adapter was trained.

    Attributes:
        path: The adapter.
        report: Everything that was compared.
    """

    remedy: ClassVar[str] = (
        "Start the engine as `peftstate vllm-args` says, or load an adapter that fits this one."
    )

    def __init__(self, path: str, report: Report) -> None:
        text = _mismatch_text(report.mismatches, self.remedy, "")
        super().__init__(f"{printable(path)}: {text}")
        self.path = path
        self.report = report

    @property
    def mismatches(self) -> tuple[Mismatch, ...]:
        """Every difference that was found."""
        return self.report.mismatches


class ServerError(PeftStateError, OSError):
    """A server gave nothing that could be compared; the cause, if there is one, is chained.

    Attributes:
        url: What was asked for.
        reason: What is wrong, and what to do.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{printable(url)}: {reason}")
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class SaveError(PeftStateError):
    """The state cannot be saved in a form that could be restored; no old file was replaced.

    Attributes:
        rescued: A folder with all that could be saved, or `None`.
    """

    def __init__(self, message: str, *, rescued: str | None = None) -> None:
        where = f" What could be saved is in {rescued}." if rescued else ""
        super().__init__(f"{message} No old file was replaced.{where}")
        self.rescued = rescued


class RestoreError(PeftStateError):
    """A section could not be restored; the cause is chained.

    Attributes:
        section: Name of the section.
    """

    def __init__(self, section: str, message: str) -> None:
        super().__init__(f"{section}: {message}")
        self.section = section


class AdapterLoadError(RestoreError, ValueError, RuntimeError):
    """An adapter could not be loaded, for instance since its config makes no sense to PEFT.

    It is a `ValueError` and a `RuntimeError` too, which PEFT itself raises then.
    """


class StateMismatchError(PeftStateError):
    """The live model is not in the saved state.

    Attributes:
        report: Everything that was compared.
    """

    remedy: ClassVar[str] = "Restore the saved state with peftstate.restore(model, path)."
    section: ClassVar[str] = ""

    def __init__(self, report: Report) -> None:
        super().__init__(_mismatch_text(report.mismatches, self.remedy, self.section))
        self.report = report

    @property
    def mismatches(self) -> tuple[Mismatch, ...]:
        """Every difference that was found, of all sections."""
        return self.report.mismatches


def _mismatch_text(mismatches: tuple[Mismatch, ...], remedy: str, section: str) -> str:
    """The message of a mismatch error: a line each, then what to do."""
    count = len(mismatches)
    head = "1 value differs" if count == 1 else f"{count} values differ"
    lines = [f"{head} from the saved state:"]
    lines += [f"  {mismatch}" for mismatch in mismatches[:_SHOWN]]
    if count > _SHOWN:
        lines.append(f"  … and {count - _SHOWN} more")
    lines.append(remedy)
    if section:
        names = dict.fromkeys(mismatch.section for mismatch in mismatches)
        chosen = ", ".join(f'"{name}": "warn"' for name in names)
        lines.append(f"To load all the same, pass on_mismatch={{{chosen}}}.")
    return "\n".join(lines)


class BaseModelMismatchError(StateMismatchError):
    """The base model is not the one that the adapter was trained on."""

    section = "base_model"
    remedy = "Load the base model that the adapter was trained on, at the same revision."


class QuantizationMismatchError(StateMismatchError):
    """The base model is quantized in another way, or not at all."""

    section = "quantization"
    remedy = (
        "Load the base model with from_pretrained(…, **peftstate.base_model_kwargs(path)), "
        "or load everything with peftstate.AutoPeftModelFor….from_pretrained(path)."
    )


class DtypeMismatchError(StateMismatchError):
    """Parameters or buffers have other dtypes, and casting them would lose values."""

    section = "dtype"
    remedy = "Load the base model with from_pretrained(…, **peftstate.base_model_kwargs(path))."


class AdapterMismatchError(StateMismatchError):
    """The adapter in the model, or its config, is not the one that was saved."""

    section = "adapters"
    remedy = "Restore the adapter's files from a copy, or save the adapter again."


class ImplementationMismatchError(StateMismatchError):
    """Attention or experts run in another implementation."""

    section = "implementation"
    remedy = "Install the kernels of the saved implementation."


class TrainingStateMismatchError(StateMismatchError):
    """Train flags, trainable parameters or gradient checkpointing differ."""

    section = "training"


class GenerationConfigMismatchError(StateMismatchError):
    """The generation config differs."""

    section = "generation"


class TokenizerMismatchError(StateMismatchError):
    """The tokenizer is not the one that the model was saved with."""

    section = "tokenizer"
    remedy = "Load the tokenizer that was saved with the adapter."


class RuntimeMismatchError(StateMismatchError):
    """Process-wide numerical settings differ."""

    section = "runtime"
    remedy = "Set them as saved, or run inside peftstate.reproducible(model)."


class EnvironmentMismatchError(StateMismatchError):
    """Library versions or devices differ."""

    section = "environment"
    remedy = "Install the saved versions for results that are equal to the last bit."


class RngMismatchError(StateMismatchError):
    """The random generators are not in the saved state."""

    section = "rng"


class PredictionMismatchError(StateMismatchError):
    """The model does not predict what it predicted when it was saved."""

    section = "predictions"
    remedy = "Compare the reports of peftstate.verify(model, path) in both environments."


class PeftStateWarning(UserWarning):
    """The base of every warning that peftstate issues."""


class MissingManifestWarning(PeftStateWarning):
    """An adapter without a manifest is loaded as PEFT loads it, unverified."""


class StateMismatchWarning(PeftStateWarning):
    """A difference that was asked to be, or by default is, only warned of."""


class TrainModeWarning(PeftStateWarning):
    """The model came back in train mode, as it was saved, so dropout is on."""


class UnverifiedWarning(PeftStateWarning):
    """What was saved or loaded went a way that peftstate does not cover."""


class MergedWeightsWarning(PeftStateWarning):
    """A load may not get the merged weights that are in memory by merging again."""


class UnfinishedSaveWarning(PeftStateWarning):
    """A save is complete, but its files could not all be moved to where other programs look."""


class RankStateWarning(PeftStateWarning):
    """The random generators of one of several processes could not be saved, or not be restored."""
