"""`adopt`: a manifest for an adapter that was made without peftstate, by a plain load of it."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import attrs
import peft
import torch

from peftstate._arguments import view_to_save
from peftstate._base_loading import NOT_THERE, load_base, not_to_be_had
from peftstate._calls import calling_peft
from peftstate._codec import DecodeError, loads
from peftstate._folder import AdapterFolder
from peftstate._injection import readable_by_peft, set_tensors
from peftstate._log import tell
from peftstate._peft_config import refuse_imports
from peftstate._policy import Policy
from peftstate._saving import capture_sections, write_state
from peftstate._source import AdapterFiles, Source
from peftstate._steps import LOCK, Plan
from peftstate._storage import ADAPTER_CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAMES, staged
from peftstate._weights import parse_weights
from peftstate.errors import (
    AdapterLoadError,
    AdapterNotFoundError,
    ManifestExistsError,
)
from peftstate.manifest import MAX_BYTES, Manifest
from peftstate.sections import SECTIONS, _generators, adapters
from peftstate.sections._adapter_config import canonical_fields
from peftstate.sections._adapter_tensors import adapter_tensors
from peftstate.sections._tensors import sidecar_tensors, tensor_records, with_tensors
from peftstate.sections._view import ModelView

NAME = "default"
"""What the adapter is called."""


def adopt(
    adapter: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    prediction_probe: Mapping[str, torch.Tensor] | torch.Tensor | bool | None = None,
    **kwargs: Any,
) -> Manifest:
    """Give an adapter that was made without peftstate a manifest, by loading it as PEFT does.

    The adapter's own files stay as they are; the manifest and a sidecar are added, both or none.
    From then on a load verifies the adapter and its base model, and brings back how the base model
    was quantized and loaded here. What only who trained it knew is not made up: the sections
    `training`, `generation`, `runtime` and `rng` are recorded as not known, and no load restores or
    compares them. `environment` is that of the adoption.

    Nobody can tell here whether the base model is the one that the adapter was trained on, nor
    whether it was quantized like this then: it is recorded as it is stated.

    Args:
        adapter: The adapter's folder.
        base: The base model, a folder or the id of a repo on the Hub; by default the one that the
            adapter's config names, from where the auto classes will load it.
        prediction_probe: Inputs to predict on, now and after each load, as
            `PeftModel.save_pretrained` takes them.
        **kwargs: How the base model is loaded: ``quantization_config``, ``dtype``,
            ``attn_implementation``, ``revision`` and what else its `from_pretrained` takes.

    Returns:
        The manifest that was written.

    Raises:
        ManifestExistsError: There is one already.
        AdapterNotFoundError: There is no such folder.
        AdapterLoadError: There is no adapter in it, it cannot be loaded onto the base model, or the
            loaded model has weights that are in no file.
        IntegrityError: The weights cannot be read.
        OSError: The manifest cannot be written; nothing was.
    """
    began = time.perf_counter()
    with LOCK, _generators.kept():
        source = _read(adapter)
        config = source.adapters[NAME].config
        loaded = _load(source, base, kwargs)
        view = view_to_save(
            loaded, [NAME], fingerprint="full", tokenizer=None, prediction_probe=prediction_probe
        )
        _set_as_on_disk(view, source)
        records = _without_unknown(capture_sections(view))
        if base is not None and os.fspath(base) != config.get("base_model_name_or_path"):
            # of another repo than the one that the auto classes will ask
            records["base_model"] = attrs.evolve(
                records["base_model"], revision=None, commit=None, files={}
            )
        place = source.folder.path
        with staged(place) as staging:
            manifest = write_state(records, view, staging, adapters_in=place)
            _refuse_invented(manifest)
            _refuse_changed(manifest, source)
    known = manifest.sections.keys() - set(manifest.unknown)
    tell("adopted", place, manifest, since=began, sections=known)
    return manifest


def _read(adapter: str | os.PathLike[str]) -> Source:
    """Read the files of an adapter that has no manifest.

    Raises:
        AdapterNotFoundError: There is no such folder.
        ManifestExistsError: It has one.
        AdapterLoadError: There is no adapter in it that can be adopted.
    """
    folder = AdapterFolder.at(Path(adapter))
    if not folder.path.is_dir():
        raise AdapterNotFoundError(
            os.fspath(adapter), "of a repo on the Hub, download a copy of your own first"
        )
    if folder.exists(MANIFEST_NAME):
        raise ManifestExistsError(str(folder.path / MANIFEST_NAME))
    if folder.commit is not None:
        raise _not_adoptable(
            f"{folder.path} is in the Hub's cache, whose files are the Hub's; adopt a copy"
        )
    names = folder.names()
    weights = next((name for name in WEIGHTS_NAMES if name in names), None)
    if weights is None or ADAPTER_CONFIG_NAME not in names:
        wanted = ADAPTER_CONFIG_NAME if weights else WEIGHTS_NAMES[0]
        raise _not_adoptable(f"{folder.path} has no {wanted}, so there is no adapter to adopt")
    tensors = parse_weights(str(folder.path / weights), folder.read(weights))
    files = AdapterFiles(config=_config(folder), tensors=tensors)
    refuse_imports(files.config)
    return Source(folder=folder, manifest=Manifest(sections={}, files={}), adapters={NAME: files})


def _config(folder: AdapterFolder) -> dict[str, Any]:
    """Read the adapter's PEFT config."""
    try:
        config = loads(folder.read_bytes(ADAPTER_CONFIG_NAME, limit=MAX_BYTES))
    except DecodeError as error:
        raise _not_adoptable(f"{ADAPTER_CONFIG_NAME} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise _not_adoptable(f"{ADAPTER_CONFIG_NAME} is not an object")
    return config


def _load(
    source: Source, base: str | os.PathLike[str] | None, kwargs: Mapping[str, Any]
) -> peft.PeftModel:
    """Load the base model as it is stated, and the adapter onto it as PEFT does.

    Raises:
        AdapterLoadError: One of them cannot be loaded.
    """
    config = source.adapters[NAME].config
    name: Any = config.get("base_model_name_or_path")
    if base is not None:
        name = os.fspath(base)
    elif config.get("revision") is not None:
        kwargs = {"revision": config["revision"], **kwargs}
    try:
        model = load_base(config, name, **kwargs)
    except NOT_THERE as error:
        raise not_to_be_had(name, error) from error
    with calling_peft(), readable_by_peft(source, NAME) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # which is an error below
        try:
            loaded: peft.PeftModel = peft.PeftModel.from_pretrained(model, str(folder), NAME)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            message = f"PEFT cannot load it onto {name!r} ({type(error).__name__}: {error})"
            raise _not_adoptable(message) from error
    return loaded


def _set_as_on_disk(view: ModelView, source: Source) -> None:
    """Set the adapter's tensors from its file, in the dtypes that they have there.

    PEFT casts what it loads: to float32 from half precision, or to the base model's dtype.

    Raises:
        AdapterLoadError: The tensors in the file and those in the model are not the same ones.
    """
    files = source.adapters[NAME]
    live = adapters.capture(view)
    record = live.adapters[NAME]
    found = adapter_tensors(view, NAME, embeddings=False)
    _refuse_missing((found.saved.keys() | found.computed.keys()) - files.tensors.keys())
    described = attrs.evolve(
        record,
        tensors=tensor_records(files.tensors),
        embeddings_saved=bool(files.tensors.keys() - record.tensors.keys()),
    )
    places = adapter_tensors(
        view, NAME, embeddings=described.embeddings_saved, names=files.tensors.keys()
    )
    placed = {**places.saved, **places.computed}
    strange = [
        name
        for name, tensor in files.tensors.items()
        if name not in placed or placed[name].shape != tensor.shape
    ]
    if strange:
        raise _not_adoptable(
            f"{_some(strange, len(files.tensors))} of its weights have no place in the model; the "
            "base model is not the one that it was trained on"
        )
    expected = attrs.evolve(live, adapters={NAME: described})
    manifest = Manifest(sections={"adapters": expected}, files={})
    set_tensors(view, source.adapters, manifest, Plan(policy=Policy.of(None)))


def _refuse_missing(names: Collection[str]) -> None:
    """Refuse an adapter whose file lacks weights, for which PEFT has drawn random numbers."""
    if names:
        raise _not_adoptable(
            f"its file lacks weights that the model takes, such as {min(names)}; PEFT would draw "
            "random numbers for them"
        )


def _some(names: Collection[str], total: int) -> str:
    """How many of how many, and one of them."""
    return f"{len(names)} of {total} ({min(names)}, for one)"


def _without_unknown(records: Mapping[str, Any]) -> dict[str, Any]:
    """The records, without what only the process that trained the adapter knew."""
    known = {
        section.name: records[section.name] if section.unknown is None else section.unknown
        for section in SECTIONS
        if section.name in records
    }
    nothing = torch.zeros(1, dtype=torch.uint8)
    names = {tensor.tensor for tensor in sidecar_tensors(known["rng"])}
    return {**known, "rng": with_tensors(known["rng"], dict.fromkeys(names, nothing))}


def _refuse_invented(manifest: Manifest) -> None:
    """Refuse a model that has weights which are in no file: loading drew or computed them.

    Raises:
        AdapterLoadError: It has.
    """
    extra = manifest.sections["extra_tensors"]
    names = {*extra.base, *extra.quantized, *(n for own in extra.adapters.values() for n in own)}
    if names:
        raise _not_adoptable(
            f"the loaded model has weights that are neither in its files nor in the base model's, "
            f"such as {min(names)}: they were trained and not saved, or are computed anew by each "
            "load. Only the model that was trained has them; save that with peftstate"
        )


def _refuse_changed(manifest: Manifest, source: Source) -> None:
    """Refuse files on disk that are not those that were loaded.

    Raises:
        AdapterLoadError: They are others.
    """
    files, written = source.adapters[NAME], manifest.sections["adapters"].adapters[NAME]
    tensors, config = tensor_records(files.tensors), canonical_fields(files.config)
    if (written.tensors, written.config) != (tensors, config):
        raise _not_adoptable("its files were replaced while it was adopted; adopt it again")


def _not_adoptable(message: str) -> AdapterLoadError:
    """The error for an adapter that cannot be adopted."""
    return AdapterLoadError("adapters", message)
