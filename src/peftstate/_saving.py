"""How a model is saved: capture, let PEFT write, describe what was written, commit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import safetensors.torch
from torch.distributed.tensor import DTensor

from peftstate._digest import file_digest
from peftstate._folder import AdapterFolder
from peftstate._keys import UnusableKeyError
from peftstate._log import tell
from peftstate._names import in_folder, safe_name
from peftstate._rank_files import stale as stale_rank_files
from peftstate._ranks import rank_of
from peftstate._rescue import reason_of_disk, rescue
from peftstate._signing import key_to_save_with, sign_staged
from peftstate._snapshot import Snapshot
from peftstate._steps import unless_busy
from peftstate._storage import (
    ADAPTER_CONFIG_NAME,
    MANIFEST_NAME,
    SIDECAR_NAME,
    SIGNATURE_NAME,
    WEIGHTS_NAMES,
    UnfinishedSaveError,
    mark_removed,
    staged,
    write_file,
)
from peftstate._warn import warn
from peftstate._written import describe_written
from peftstate.errors import PeftStateError, SaveError, UnfinishedSaveWarning
from peftstate.manifest import FileRecord, Manifest
from peftstate.sections import SECTIONS, _origin, adapters, records_for_adapters
from peftstate.sections._adapter_config import completed_configs
from peftstate.sections._adapter_tensors import adapter_tensors, at_rest, live_tensors
from peftstate.sections._process import this_process
from peftstate.sections._tensors import SidecarTensor, sidecar_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftstate._keys import PrivateKey, SigningKey
    from peftstate.sections._view import ModelView

WriteAdapter = Callable[[Path, dict[str, "torch.Tensor"]], None]
"""PEFT's own `save_pretrained`: writes a model into a folder, from a state dict."""

README_NAME = "README.md"
TOKENIZER_NAME = "tokenizer_config.json"


def capture_sections(view: ModelView) -> dict[str, Any]:
    """The record of every section; the random generators first, before anything could draw."""
    view = view.now()
    ordered = sorted(SECTIONS, key=lambda section: section.name != "rng")
    records = {
        section.name: section.capture(view) for section in ordered if section.applies_to(view)
    }
    return {**records, "rng": attrs.evolve(records["rng"], process=rank_of(view))}


def save(
    view: ModelView,
    directory: Path,
    write: WriteAdapter,
    *,
    restores_base: bool = False,
    sign_with: SigningKey | None = None,
) -> Manifest:
    """Save a model's adapters, and its state beside each of them.

    Args:
        view: The model and the adapters to save.
        directory: The folder; the adapters that are not called ``"default"`` go to sub-folders.
        write: How PEFT writes them.
        restores_base: Whether PEFT converts an adapter whose initialisation rewrote the base model
            (PiSSA and its kin) into one for the base model as its checkpoint gives it.
        sign_with: The key to sign the files with.

    Returns:
        The manifest of the folder, or of the first adapter's sub-folder if none is in the folder.

    Raises:
        SaveError: The state cannot be saved. `rescued` is a folder that holds what PEFT saves or,
            when the key is at fault, everything unsigned.
    """
    save_into: Callable[[Path], object]
    began = time.perf_counter()
    try:
        with unless_busy():
            key = None if sign_with is None else key_to_save_with(sign_with)
            saved = _save(view, directory, write, restores_base=restores_base, key=key)
            tell("saved", directory, saved, since=began)
            return saved
    except SaveError:
        raise
    except Exception as error:
        # Whatever the reason, days of training must not be lost to it.
        if isinstance(error, UnusableKeyError):
            message = f"The files cannot be signed: {error}."
            save_into = partial(_save, view, write=write, restores_base=restores_base)
        elif reason := reason_of_disk(error, directory):
            message = f"{directory}: {reason}."
            save_into = partial(_save, view, write=write, restores_base=restores_base)
        else:
            known = isinstance(error, (PeftStateError, ValueError))
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            message = f"The state of the model cannot be saved: {reason.rstrip('. ')}."
            save_into = partial(_write_adapters, view, write=write, converts=restores_base)
        rescued = rescue(directory, save_into)
        if rescued is None and restores_base and isinstance(error, ValueError):
            raise  # PEFT says of some configs that it cannot convert them
        raise SaveError(message, rescued=rescued) from error


def _save(
    view: ModelView,
    directory: Path,
    write: WriteAdapter,
    *,
    restores_base: bool,
    key: PrivateKey | None = None,
) -> Manifest:
    """Save, all or nothing."""
    for folder in view.folders.values():
        safe_name(in_folder(folder, ADAPTER_CONFIG_NAME))  # or no load would take it
    records = capture_sections(view)
    if restores_base:
        names = records["extra_tensors"].among(records["base_model"].tensors)
        original = _origin.originals(view, names)
        records["base_model"] = records["base_model"].with_original(original)
        records["extra_tensors"] = records["extra_tensors"].without(original)
    manifests: dict[str, Manifest] = {}
    try:
        with staged(directory) as staging:
            readme = directory / README_NAME
            if readme.is_file():  # PEFT adds to the one that is there
                shutil.copyfile(readme, staging / README_NAME)
            _write_adapters(view, staging, write, converts=restores_base)
            _remove_stale(view, staging, directory)
            for view_of_folder, folder in _folders(view):
                described = _for_folder(records, view_of_folder)
                place = staging / folder
                manifests[folder] = write_state(described, view_of_folder, place, adapters_in=place)
            if key is not None:
                sign_staged(staging, directory, manifests, key)
    except UnfinishedSaveError as error:
        warn(str(error), UnfinishedSaveWarning)
    return next(iter(manifests.values()))


def _folders(view: ModelView) -> list[tuple[ModelView, str]]:
    """The folders that get a manifest, the root last, each with the adapters it describes."""
    extra = [(view.only(name), folder) for name, folder in view.folders.items() if folder != "."]
    root = [(view, ".")] if "." in view.folders.values() else []
    return [*extra, *root]


def _for_folder(records: Mapping[str, Any], view: ModelView) -> dict[str, Any]:
    """The records as one folder holds them: of its own adapters."""
    narrowed = records_for_adapters(records, view.adapters)
    narrowed["adapters"] = narrowed["adapters"].in_folders(view.folders)
    return narrowed


def _remove_stale(view: ModelView, staging: Path, directory: Path) -> None:
    """Have files removed that an older save left and this one does not write.

    PEFT would load an old ``.safetensors`` file rather than a new ``.bin`` one, and transformers
    an old chat template beside a tokenizer that has none.
    """
    stale = [
        staging / folder / name
        for folder in view.folders.values()
        for name in (*WEIGHTS_NAMES, SIDECAR_NAME, SIGNATURE_NAME)
    ]
    if (staging / TOKENIZER_NAME).exists():
        names = ["added_tokens.json", "chat_template.jinja", "special_tokens_map.json"]
        stale += [staging / name for name in names]
    world_size = this_process().world_size
    for folder in view.folders.values():
        present = AdapterFolder.at(directory / folder).names()
        stale += [staging / folder / name for name in stale_rank_files(present, world_size)]
    for file in stale:
        if not file.exists():
            mark_removed(file)


def write_state(
    records: dict[str, Any], view: ModelView, folder: Path, *, adapters_in: Path
) -> Manifest:
    """Write sidecar and manifest of a folder, after its adapters were written.

    Args:
        records: What was captured.
        view: The model, with the adapters that the folder has.
        folder: Where to write.
        adapters_in: Where the adapters were written.
    """
    files: dict[str, FileRecord] = {}
    written: dict[str, adapters.AdapterRecord] = {}
    for name, record in records["adapters"].adapters.items():
        written[name], found = describe_written(record, adapters_in / record.folder)
        files |= {in_folder(record.folder, file): value for file, value in found.items()}
    embeddings = _saved_embeddings(written, view)
    records["base_model"] = records["base_model"].with_shadowed(embeddings)
    records["extra_tensors"] = records["extra_tensors"].without(embeddings)
    records["adapters"] = attrs.evolve(records["adapters"], adapters=written)
    tensors = {tensor.tensor: tensor for tensor in sidecar_tensors(records)}
    if tensors:
        data = safetensors.torch.save(_apart(tensors.values()))
        write_file(folder / SIDECAR_NAME, data)
        files[SIDECAR_NAME] = FileRecord(size=len(data), sha256=file_digest(data))
    manifest = Manifest(sections=records, files=files)
    write_file(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


def _apart(tensors: Iterable[SidecarTensor]) -> dict[str, torch.Tensor]:
    """The tensors by name, as safetensors writes them: in order, and no two in one memory."""
    found: dict[str, torch.Tensor] = {}
    memories: set[int] = set()
    for tensor in tensors:
        data = tensor.load().contiguous()
        memory = data.untyped_storage().data_ptr()
        found[tensor.tensor] = data.clone() if memory in memories else data
        memories.add(memory)
    return found


def _saved_embeddings(written: Mapping[str, adapters.AdapterRecord], view: ModelView) -> set[str]:
    """The names of the base model's tensors that PEFT wrote into an adapter's file."""
    saved_too = {id(tensor) for tensor in _embeddings(written, view)}
    if not saved_too:
        return set()
    return {
        site.name for site in view.tensors() if site.part == "base" and id(site.tensor) in saved_too
    }


def _embeddings(
    written: Mapping[str, adapters.AdapterRecord], view: ModelView
) -> list[torch.Tensor]:
    """The live tensors that are in the adapters' files because embeddings were saved."""
    found: list[torch.Tensor] = []
    for name, record in written.items():
        if record.embeddings_saved:
            tensors = adapter_tensors(view, name, embeddings=True, names=record.tensors.keys())
            found += tensors.saved.values()
    return found


def _write_adapters(view: ModelView, folder: Path, write: WriteAdapter, *, converts: bool) -> None:
    """Have PEFT write the adapters into a folder, and leave the model as it is."""
    model = view.model
    # PEFT edits the configs, and to convert it loads another adapter; if it fails they stay.
    snapshot = Snapshot.of(model) if converts else Snapshot.of_configs(model)
    try:
        with at_rest(model, next(iter(view.adapters.values()))), completed_configs(model):
            write(folder, _detached(model))
    except BaseException as error:
        snapshot.restore()
        if isinstance(error, RuntimeError) and (shard := _first_shard(view)):
            raise ValueError(
                f"the adapter's tensor {shard!r} is a shard of FSDP's; gather the tensors on all "
                "ranks with torch.distributed.checkpoint.state_dict.get_model_state_dict, and pass "
                "them as state_dict="
            ) from error
        raise


def _first_shard(view: ModelView) -> str | None:
    """The name of an adapter's tensor of which this process has but a part, if there is one."""
    sites = (site for site in view.tensors() if site.part == "adapter")
    return next((site.name for site in sites if isinstance(site.tensor, DTensor)), None)


def _detached(model: nn.Module) -> dict[str, torch.Tensor]:
    """What PEFT is handed as the model's state dict."""
    return {
        name: tensor.detach() if tensor.requires_grad else tensor
        for name, tensor in live_tensors(model).items()
    }
