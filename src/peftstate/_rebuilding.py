"""Rebuilding the base model of an adapter: what to hand to its `from_pretrained`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._arguments import hub_arguments
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
from peftstate._peft_config import refuse_base_class
from peftstate._report import Report
from peftstate._signature import open_for_load
from peftstate._storage import MANIFEST_NAME
from peftstate.errors import AdapterLoadError, AdapterMismatchError, RestoreError
from peftstate.manifest import Manifest
from peftstate.sections import quantization
from peftstate.sections._model_config import config_edits
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
class RecordedBase:
    """What a folder with a manifest says of its base model.

    Attributes:
        config: The bytes of the adapter's PEFT config, with the revision of the base model to load.
        commit: The commit that they are of, if they come from the Hub.
        kwargs: What to hand to the base model's `from_pretrained`.
    """

    config: bytes
    commit: str | None
    kwargs: dict[str, Any]


def recorded_base(
    path: str, revision: str | None, kwargs: dict[str, Any], trusted_keys: TrustedKeys | None
) -> RecordedBase | None:
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
    return RecordedBase(config=dumps(config), commit=folder.commit, kwargs=found)


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
