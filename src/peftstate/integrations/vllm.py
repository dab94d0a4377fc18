"""vLLM refuses an adapter that is not as it was saved, or that does not fit the engine.

vLLM takes an adapter from ``--lora-modules``, from ``POST /v1/load_lora_adapter``, and from a
resolver when a request asks for one. All three end in `PEFTHelper.from_local_dir`, in the worker
that then reads the weights, so that is where the manifest is looked at. The package declares
`register` as an entry point of ``vllm.general_plugins``: where both are installed it is active.

Compared are the files, the base model's config, its dtype and quantization, the adapter's dtype and
rank, and the tokenizer where its files are on this machine. The base model's weights are not: vLLM
holds them fused and in layouts of its own, of which no digest is known. `peftstate.probe` is for
that.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftstate import _diff
from peftstate._diff import ABSENT, Mismatch, steps
from peftstate._files import manifest_of
from peftstate._folder import AdapterFolder
from peftstate._policy import Action, Policy
from peftstate._report import FILES, Report
from peftstate._storage import MANIFEST_NAME
from peftstate._verifying import verify_files
from peftstate._vllm import FAMILIES, needed
from peftstate.errors import (
    EngineMismatchError,
    IntegrityError,
    ManifestError,
    TokenizerMismatchError,
)

if TYPE_CHECKING:
    from peftstate._vllm import Engine
    from peftstate.manifest import Manifest

REQUIRE_MANIFEST = "PEFTSTATE_VLLM_REQUIRE_MANIFEST"
"""The environment variable that, at 1, has adapters without a manifest refused."""
ON_MISMATCH = "PEFTSTATE_VLLM_ON_MISMATCH"
"""The one that takes actions by section: ``tokenizer=warn,base_model=warn``."""

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""What vLLM loads, the first that is there (`vllm/lora/lora_model.py::from_local_checkpoint`)."""
_log = logging.getLogger("vllm.peftstate")  # below the logger that vLLM sets up
_MARK = "__peftstate__"
_engines: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The config of each engine whose worker is in this process, by what loads its adapters."""
_verified: dict[str, tuple[Any, ...]] = {}
"""Folders whose files were as saved → size and times of each of them then."""


def register() -> None:
    """Have vLLM look at manifests. vLLM calls this in each of its processes, some of them twice.

    Raises:
        RuntimeError: This vLLM loads adapters in another way. vLLM then does not start.
    """
    try:
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.worker_manager import WorkerLoRAManager
    except ImportError as error:
        raise _unknown(str(error)) from error
    hook(PEFTHelper, WorkerLoRAManager)


def _unknown(what: str) -> RuntimeError:
    """The error for a vLLM whose loading of adapters is not known."""
    return RuntimeError(
        f"peftstate cannot verify the adapters of this vLLM ({what}). It knows vLLM 0.32; install "
        "that, or a newer peftstate, or leave adapters unverified by VLLM_PLUGINS without "
        "'peftstate'."
    )


def hook(helper: Any, manager: Any) -> None:
    """Wrap what reads an adapter's config, and what knows the engine.

    Args:
        helper: vLLM's `PEFTHelper`.
        manager: vLLM's `WorkerLoRAManager`.

    Raises:
        RuntimeError: They are not as in the vLLM that is known.
    """
    read, start = vars(helper).get("from_local_dir"), vars(manager).get("__init__")
    if not isinstance(read, classmethod) or start is None:
        raise _unknown("PEFTHelper.from_local_dir or WorkerLoRAManager.__init__ is gone")
    if hasattr(read.__func__, _MARK):
        return
    inner = read.__func__

    @functools.wraps(inner)
    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        check(lora_path, list(_engines.values()))
        return inner(cls, lora_path, *args, **kwargs)

    @functools.wraps(start)
    def remember(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        start(self, vllm_config, *args, **kwargs)
        _engines[self] = vllm_config

    setattr(from_local_dir, _MARK, True)
    helper.from_local_dir = classmethod(from_local_dir)
    manager.__init__ = remember
    _log.info("peftstate verifies adapters before they are loaded.")


def check(path: str, engines: list[Any]) -> None:
    """Refuse an adapter that is not as it was saved, or that an engine does not fit.

    Args:
        path: Its folder.
        engines: The configs of the engines that may have asked for it; commonly one.

    Raises:
        ManifestError: Its manifest cannot be used, or there is none and one is required.
        IntegrityError: Its files are not those that were saved.
        EngineMismatchError: The engine computes something else.
        NotServableError: vLLM cannot compute what the manifest says.
    """
    folder = AdapterFolder.at(Path(path))
    if not folder.exists(MANIFEST_NAME):
        _without_manifest(path)
        return
    _check_files(folder)
    manifest = manifest_of(folder)
    wanted = needed(manifest, path, has_bitsandbytes=True)
    for note in wanted.notes:
        _log.warning("%s: %s", path, note)
    policy = _policy()
    for config in engines:
        _apply(path, policy, Report(tuple(mismatches(manifest, wanted, config)), _SECTIONS))
        has_tokenizer = _check_tokenizer(path, manifest, config, policy)
        _note_name(path, manifest, config)
        _log.info(
            "%s is as it was saved and fits the engine (%s). The base model's weights were not "
            "compared; `peftstate probe` compares what is computed.",
            path,
            ", ".join([*_SECTIONS, *(["tokenizer"] if has_tokenizer else [])]),
        )


_SECTIONS = ("base_model", "quantization", "dtype", "adapters")


def _without_manifest(path: str) -> None:
    """Warn of an adapter without a manifest, or refuse it.

    The error is no `FileNotFoundError`, in whose place vLLM puts one of its own.
    """
    if os.environ.get(REQUIRE_MANIFEST, "") not in ("", "0"):
        raise ManifestError(
            path,
            f"there is no peftstate manifest, and {REQUIRE_MANIFEST} is set. Save the adapter with "
            "peftstate, or unset it.",
        )
    _log.warning("%s: there is no peftstate manifest; it is loaded unverified.", path)


def _check_files(folder: AdapterFolder) -> None:
    """Compare the files of a folder with its manifest, unless they were and have not changed.

    vLLM reads them itself, after this, and by their plain names: a file that was put in the place
    of another in between is not seen, and what a save has not moved to its name yet is not read.

    Raises:
        IntegrityError: They are not those that were saved.
        AdapterMismatchError: The PEFT config is not.
    """
    if folder.is_pending:
        found = "the files of a save that did not finish, which vLLM would not read"
        raise IntegrityError(str(folder.path), "all files in their places", found)
    stamps = _stamps(folder.path)
    if _verified.get(str(folder.path)) == stamps:
        return
    report = verify_files(folder.path)
    own = tuple(item for item in report.mismatches if _is_of(folder, item))
    if own:
        error = Report(own, report.sections).error()
        if isinstance(error, IntegrityError):
            path = str(folder.path / error.file)
            raise IntegrityError(path, error.expected, error.actual)
        raise error
    loaded = next((name for name in _WEIGHTS if folder.exists(name)), None)
    if loaded is not None and loaded not in manifest_of(folder).files:
        found = "weights that were not saved with it, and that vLLM would load"
        raise IntegrityError(str(folder.path / loaded), "no such file", found)
    _verified[str(folder.path)] = stamps


def _stamps(folder: Path) -> tuple[Any, ...]:
    """What changes when a file of a folder does: names, sizes, times."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return tuple(
        sorted((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found)
    )


def _is_of(folder: AdapterFolder, mismatch: Mismatch) -> bool:
    """Whether a mismatch concerns the adapter in the folder itself, which alone vLLM loads."""
    if mismatch.section == FILES:
        return "/" not in steps(mismatch.field)[0]
    records = manifest_of(folder).sections["adapters"].adapters
    return any(
        record.folder == "." and name in steps(mismatch.field) for name, record in records.items()
    )


def _policy() -> Policy:
    """What the environment says is to be done about a difference.

    Raises:
        ValueError: It names no section, or no action.
    """
    chosen: dict[str, Any] = {}
    for item in filter(None, os.environ.get(ON_MISMATCH, "").split(",")):
        section, _, action = item.strip().partition("=")
        chosen[section] = action
    try:
        return Policy.of(chosen)
    except ValueError as error:
        raise ValueError(f"{ON_MISMATCH}: {error}") from None


def _apply(path: str, policy: Policy, report: Report) -> None:
    """Raise, log, or pass over differences.

    Raises:
        EngineMismatchError: One is an error.
    """
    by_action: dict[Action, list[Mismatch]] = {"error": [], "warn": [], "ignore": []}
    for mismatch in report.mismatches:
        by_action[policy.action(mismatch)].append(mismatch)
    for mismatch in by_action["warn"]:
        _log.warning("%s: %s", path, mismatch)
    if by_action["error"]:
        raise EngineMismatchError(path, Report(tuple(by_action["error"]), report.sections))


def mismatches(manifest: Manifest, wanted: Engine, config: Any) -> Iterator[Mismatch]:
    """What an engine computes otherwise than the manifest says.

    Args:
        manifest: The adapter's manifest.
        wanted: What it asks of an engine.
        config: vLLM's config of the engine.
    """
    model, lora = config.model_config, config.lora_config
    yield from _of_base(manifest.sections["base_model"], model.hf_config)
    allowed = (None,) if wanted.quantization is None else FAMILIES[wanted.quantization]
    if model.quantization not in allowed:
        yield Mismatch("quantization", "method", wanted.quantization, model.quantization)
    dtype = _name(model.dtype)
    if dtype != wanted.dtype:
        yield Mismatch("dtype", "base.default", wanted.dtype, dtype)
    lora_dtype = _name(lora.lora_dtype)
    if lora_dtype not in ("auto", wanted.lora_dtype or wanted.dtype):
        yield Mismatch("dtype", "adapters", wanted.lora_dtype or wanted.dtype, lora_dtype)
    if lora.max_lora_rank < wanted.rank:
        yield Mismatch("adapters", "rank", wanted.rank, f"--max-lora-rank {lora.max_lora_rank}")


def _of_base(record: Any, config: Any) -> Iterator[Mismatch]:
    """The differences of the base model's architecture and config.

    Fields that only one of two transformers versions knows are none, and ids of special tokens,
    which trainers edit on the live model, are none of the base model.
    """
    from peftstate.sections._model_config import RESTORED_CONFIG, config_fields

    architectures = getattr(config, "architectures", None) or [record.model_class]
    if record.model_class not in architectures:
        yield Mismatch("base_model", "model_class", record.model_class, architectures[0])
    found = config_fields(config)
    for mismatch in _diff.diff("base_model", {"config": dict(record.config)}, {"config": found}):
        values = (mismatch.saved, mismatch.found)
        edited = RESTORED_CONFIG & set(steps(mismatch.field))
        if not edited and ABSENT not in values and mismatch.saved != mismatch.found:
            yield mismatch


def _name(dtype: Any) -> str:
    """The name of a dtype of torch, or a name as it is."""
    return str(dtype).removeprefix("torch.")


def _check_tokenizer(path: str, manifest: Manifest, config: Any, policy: Policy) -> bool:
    """Compare the engine's tokenizer with the saved one, if its files are on this machine.

    Returns:
        Whether they were compared.

    Raises:
        EngineMismatchError: It is another one.
    """
    from peftstate._tokenizer_files import CONFIG_NAME, check_beside

    place = getattr(config.model_config, "tokenizer", None)
    if not isinstance(place, str) or not Path(place, CONFIG_NAME).is_file():
        return False
    if "tokenizer" not in manifest.sections or not policy.handles("tokenizer"):
        return False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_beside(AdapterFolder.at(Path(place)), manifest, policy)
        except TokenizerMismatchError as error:
            raise EngineMismatchError(path, error.report) from None
    for warning in caught:
        _log.warning("%s", warning.message)
    return True


def _note_name(path: str, manifest: Manifest, config: Any) -> None:
    """Log another name of the base model, which may be the same one elsewhere."""
    saved, found = manifest.sections["base_model"].name, str(config.model_config.model)
    if saved and Path(saved).name != Path(found).name:
        _log.warning("%s: the base model was called %s; the engine's is %s.", path, saved, found)
