"""The auto classes, which rebuild the base model from the manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import peft
from peft import PeftConfig

from peftstate import _models
from peftstate._arguments import hub_arguments
from peftstate._calls import calling_peft
from peftstate._codec import dumps
from peftstate._files import (
    check_folders,
    compare_config,
    consistently,
    manifest_of,
    read_config,
    read_manifest,
)
from peftstate._folder import AdapterFolder
from peftstate._injection import temporary_folder
from peftstate._keys import trusted_by_id
from peftstate._peft_config import refuse_base_class
from peftstate._policy import OnMismatch
from peftstate._report import Report
from peftstate._signature import open_for_load
from peftstate._steps import LOCK
from peftstate._storage import ADAPTER_CONFIG_NAME, MANIFEST_NAME
from peftstate.errors import AdapterLoadError, AdapterMismatchError, RestoreError
from peftstate.manifest import Manifest
from peftstate.sections import quantization
from peftstate.sections._model_config import BUILT_CONFIG, config_edits
from peftstate.sections._tensors import dtype_named
from peftstate.sections.implementation import (
    ATTENTION,
    EXPERTS,
    ImplementationRecord,
    is_installed,
)

if TYPE_CHECKING:
    import torch

    from peftstate._diff import Json
    from peftstate._keys import TrustedKeys


def base_model_kwargs(source: Manifest | str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """What to hand to ``AutoModelFor….from_pretrained`` to rebuild the base model of an adapter.

    Args:
        source: A manifest, the adapter's folder, or the id of a repo on the Hub.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like, of the adapter.

    Returns:
        The quantization config, the dtype, the implementation of attention and experts, and the
        revision, as far as they were recorded.

    Raises:
        ManifestError: There is no manifest, or it cannot be used.
        AdapterLoadError: The model was quantized in a way that cannot be rebuilt from a manifest;
            the caller must pass ``quantization_config`` himself.
        RestoreError: The dtype or the revision is none.
    """
    manifest = source if isinstance(source, Manifest) else read_manifest(source, **hub)
    try:
        quantized = quantization.quantization_kwargs(manifest.sections["quantization"])
    except ValueError as error:
        raise AdapterLoadError("quantization", str(error)) from None
    return quantized | _kwargs_but_quantization(manifest)


def _kwargs_but_quantization(manifest: Manifest) -> dict[str, Any]:
    """Dtype, implementation and revision of the base model, as far as they were recorded."""
    kwargs = _implementation_kwargs(manifest.sections["implementation"])
    base = manifest.sections["base_model"]
    if base.load_dtype is not None:
        kwargs["dtype"] = _load_dtype(base.load_dtype)
    revision = base.commit or base.revision
    if revision is not None:
        kwargs["revision"] = _checked_revision(revision)
    return kwargs


def _load_dtype(name: str) -> torch.dtype:
    """The dtype to load a base model in.

    Raises:
        RestoreError: It is none that a model can be loaded in.
    """
    dtype = dtype_named(name) if name in FLOATING else None
    if dtype is None:
        raise RestoreError("base_model", f"no base model can be loaded in the dtype {name!r}")
    return dtype


def _checked_revision(revision: str) -> str:
    """A revision to ask the Hub for, which becomes a part of a path in the Hub's cache.

    Raises:
        RestoreError: It is no branch, tag or commit.
    """
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise RestoreError("base_model", f"{revision[:80]!r} is no revision of a base model")
    return revision


_REVISION = re.compile(r"[\w][\w./+-]{0,254}", re.ASCII)
FLOATING = frozenset({"bfloat16", "float16", "float32", "float64"})
"""The dtypes that a manifest may have a base model loaded in."""


def _implementation_kwargs(record: ImplementationRecord) -> dict[str, Any]:
    """The arguments for attention and experts, from the closed tables only."""
    kwargs: dict[str, Any] = {}
    for name, saved, allowed in (
        ("attn_implementation", record.attention, ATTENTION),
        ("experts_implementation", record.experts, EXPERTS),
    ):
        if saved and all(value in allowed and is_installed(value) for value in saved.values()):
            kwargs[name] = saved[""] if saved.keys() == {""} else dict(saved)
    return kwargs


@attrs.frozen(kw_only=True)
class _Recorded:
    """What a folder with a manifest says of its base model.

    Attributes:
        config: The bytes of the adapter's PEFT config, with the revision of the base model to load.
        commit: The commit that they are of, if they come from the Hub.
        kwargs: What to hand to the base model's `from_pretrained`.
    """

    config: bytes
    commit: str | None
    kwargs: dict[str, Any]


class _PeftLoader:
    """Stands where PEFT expects the class of the PEFT model, and adds our own arguments."""

    def __init__(
        self, target: type[_models.PeftModel], path: str, arguments: dict[str, Any]
    ) -> None:
        self.__name__ = target.__name__
        self._target = target
        self._path = path
        self._arguments = arguments

    def from_pretrained(self, model: Any, _: str, **kwargs: Any) -> _models.PeftModel:
        """Load the adapter onto the base model, without the arguments that were for the base."""
        kept = {name: value for name, value in kwargs.items() if name not in _FOR_THE_BASE}
        return self._target.from_pretrained(model, self._path, **{**kept, **self._arguments})


_FOR_THE_BASE = (
    frozenset(
        {
            "quantization_config",
            "dtype",
            "torch_dtype",
            "attn_implementation",
            "experts_implementation",
        }
    )
    | BUILT_CONFIG
)
"""Arguments that PEFT hands on to both loads and that mean nothing to the second."""


class _Auto:
    """What our auto classes add to PEFT's."""

    _target_class: Any
    _target_peft_class: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool | None = None,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        *,
        on_mismatch: OnMismatch | None = None,
        require_manifest: bool = False,
        adapters: Collection[str] | None = None,
        tokenizer: Any = None,
        trusted_keys: TrustedKeys | None = None,
        **kwargs: Any,
    ) -> Any:
        """Rebuild the base model as it was, and load the adapter onto it.

        Args:
            pretrained_model_name_or_path: The adapter's folder, or the id of a repo on the Hub.
            adapter_name: As in PEFT.
            is_trainable: As in `PeftModel.from_pretrained`.
            config: As in PEFT.
            revision: The revision of the adapter, as in PEFT.
            import_allowlist: As in PEFT, which has it in newer versions.
            on_mismatch: As in `PeftModel.from_pretrained`.
            require_manifest: As in `PeftModel.from_pretrained`.
            adapters: As in `PeftModel.from_pretrained`.
            tokenizer: As in `PeftModel.from_pretrained`.
            trusted_keys: As in `PeftModel.from_pretrained`.
            **kwargs: As in PEFT. What is passed for the base model wins over what was recorded,
                and is then compared with it like anything else.

        Raises:
            PeftStateError: As in `PeftModel.from_pretrained`.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if trusted_keys is not None:  # which may be an iterator, and are used twice
            trusted_keys = list(trusted_by_id(trusted_keys).values())
        own = {
            "on_mismatch": on_mismatch,
            "require_manifest": require_manifest,
            "adapters": adapters,
            "tokenizer": tokenizer,
            "revision": revision,
            "trusted_keys": trusted_keys,
        }
        if import_allowlist is not None:
            kwargs["import_allowlist"] = import_allowlist
        with LOCK, ExitStack() as stack:
            recorded = _recorded(path, revision, kwargs, trusted_keys)
            seen = path
            if recorded is not None:
                own |= {name: kwargs.pop(name) for name in ("subfolder",) if name in kwargs}
                own["revision"] = recorded.commit or revision  # a branch may move meanwhile
                seen = str(stack.enter_context(_with_config_only(recorded.config)))
                kwargs = {**recorded.kwargs, **kwargs}
            loader = _loader(cls, path, own)
            stack.enter_context(calling_peft())
            return loader.from_pretrained(
                seen,
                adapter_name=adapter_name,
                is_trainable=is_trainable,
                config=config,
                revision=revision,
                **kwargs,
            )


def _loader(cls: type[_Auto], path: str, own: dict[str, Any]) -> Any:
    """PEFT's auto class, which loads with ours."""
    return type(
        cls.__name__,
        (peft.auto._BaseAutoPeftModel,),
        {
            "_target_class": cls._target_class,
            "_target_peft_class": _PeftLoader(cls._target_peft_class, path, own),
        },
    )


@contextmanager
def _with_config_only(config: bytes) -> Iterator[Path]:
    """A folder in which PEFT finds an adapter's config, and no tokenizer.

    It would load one and, where it has more tokens than the base model has embeddings, add random
    ones (`peft/auto.py`). The sizes that were saved are in the manifest.
    """
    with temporary_folder() as folder:
        (folder / ADAPTER_CONFIG_NAME).write_bytes(config)
        yield folder


def _recorded(
    path: str, revision: str | None, kwargs: dict[str, Any], trusted_keys: TrustedKeys | None
) -> _Recorded | None:
    """What the manifest says of the base model; `None` if there is none."""
    hub = {**hub_arguments(kwargs), "revision": revision}
    folder = open_for_load(path, trusted_keys=trusted_keys, **hub)
    if folder.trusted is None and not folder.exists(MANIFEST_NAME):
        return None

    manifest, config = consistently(folder, _read_config)
    refuse_base_class(config, kwargs.get("import_allowlist"))
    passed = "quantization_config" in kwargs  # then it need not be one that can be rebuilt
    found = _kwargs_but_quantization(manifest) if passed else base_model_kwargs(manifest)
    base_revision = found.pop("revision", None)
    if "torch_dtype" in kwargs:  # the old name of the same argument
        found.pop("dtype", None)
    found |= edits_of_config(manifest, config, base_revision, kwargs)
    if base_revision is not None:
        config = {**config, "revision": base_revision}
    return _Recorded(config=dumps(config), commit=folder.commit, kwargs=found)


def _read_config(folder: AdapterFolder) -> tuple[Manifest, dict[str, Json]]:
    """Read a manifest, and the config of the folder's own adapter, which must be the recorded one.

    Raises:
        AdapterMismatchError: It is another one.
    """
    manifest = manifest_of(folder)
    check_folders(folder, manifest)
    records = manifest.sections["adapters"].adapters
    own = next(name for name, record in records.items() if record.folder == ".")
    config = read_config(folder, records[own])
    if mismatches := compare_config(own, records[own], config):
        raise AdapterMismatchError(Report(mismatches, ("adapters",)))
    return manifest, config


def edits_of_config(
    manifest: Manifest, adapter: Mapping[str, Any], revision: str | None, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What to hand to the base model's `from_pretrained` so that its config is the saved one."""
    from transformers import AutoConfig

    hub = {name: kwargs[name] for name in _OF_THE_CONFIG if name in kwargs}
    name: Any = adapter.get("base_model_name_or_path")
    asked = revision or adapter.get("revision")
    try:
        found = AutoConfig.from_pretrained(name, revision=asked, **hub)
    except (OSError, ValueError, TypeError):  # the load itself says more, or needs no such config
        return {}
    edits = config_edits(manifest.sections["base_model"].config, found)
    if "num_labels" in kwargs:
        edits = {name: value for name, value in edits.items() if name not in _LABELS}
    return edits


_OF_THE_CONFIG = ("cache_dir", "force_download", "local_files_only", "token", "trust_remote_code")
"""The caller's arguments that loading the config of a base model takes."""
_LABELS = ("id2label", "label2id")
"""Fields that `num_labels` is the length of."""


class AutoPeftModel(_Auto, peft.AutoPeftModel):
    """`peft.AutoPeftModel`, which rebuilds the base model from the manifest."""

    _target_peft_class = _models.PeftModel


class AutoPeftModelForCausalLM(_Auto, peft.AutoPeftModelForCausalLM):
    """`peft.AutoPeftModelForCausalLM`, which rebuilds the base model from the manifest."""

    _target_peft_class = _models.PeftModelForCausalLM


class AutoPeftModelForFeatureExtraction(_Auto, peft.AutoPeftModelForFeatureExtraction):
    """`peft.AutoPeftModelForFeatureExtraction`, which rebuilds the base from the manifest."""

    _target_peft_class = _models.PeftModelForFeatureExtraction


class AutoPeftModelForQuestionAnswering(_Auto, peft.AutoPeftModelForQuestionAnswering):
    """`peft.AutoPeftModelForQuestionAnswering`, which rebuilds the base from the manifest."""

    _target_peft_class = _models.PeftModelForQuestionAnswering


class AutoPeftModelForSeq2SeqLM(_Auto, peft.AutoPeftModelForSeq2SeqLM):
    """`peft.AutoPeftModelForSeq2SeqLM`, which rebuilds the base model from the manifest."""

    _target_peft_class = _models.PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_Auto, peft.AutoPeftModelForSequenceClassification):
    """`peft.AutoPeftModelForSequenceClassification`, which rebuilds the base from the manifest."""

    _target_peft_class = _models.PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_Auto, peft.AutoPeftModelForTokenClassification):
    """`peft.AutoPeftModelForTokenClassification`, which rebuilds the base from the manifest."""

    _target_peft_class = _models.PeftModelForTokenClassification


CLASSES: dict[type[Any], type[_Auto]] = {
    peft.AutoPeftModel: AutoPeftModel,
    peft.AutoPeftModelForCausalLM: AutoPeftModelForCausalLM,
    peft.AutoPeftModelForFeatureExtraction: AutoPeftModelForFeatureExtraction,
    peft.AutoPeftModelForQuestionAnswering: AutoPeftModelForQuestionAnswering,
    peft.AutoPeftModelForSeq2SeqLM: AutoPeftModelForSeq2SeqLM,
    peft.AutoPeftModelForSequenceClassification: AutoPeftModelForSequenceClassification,
    peft.AutoPeftModelForTokenClassification: AutoPeftModelForTokenClassification,
}
"""The class of ours for each of PEFT's."""
