"""What a load reads from a folder, each file once, checked before anything is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PromptLearningConfig

from peftstate._files import (
    check_folders,
    compare_config,
    consistently,
    manifest_of,
    read_config,
    read_recorded,
)
from peftstate._folder import AdapterFolder
from peftstate._names import in_folder
from peftstate._peft_config import refuse_imports
from peftstate._ranks import with_own_states
from peftstate._report import Report
from peftstate._signature import check_all
from peftstate._storage import MANIFEST_NAME, SIDECAR_NAME, WEIGHTS_NAMES
from peftstate._weights import check_tensors, parse_weights
from peftstate.errors import AdapterLoadError, AdapterMismatchError, ManifestDecodeError
from peftstate.manifest import Manifest
from peftstate.sections._tensors import SidecarTensor, sidecar_tensors, with_tensors

if TYPE_CHECKING:
    import torch

    from peftstate._diff import Json
    from peftstate.sections.adapters import AdapterRecord


@attrs.frozen(kw_only=True)
class AdapterFiles:
    """One adapter as it was read.

    Attributes:
        config: The JSON of its PEFT config.
        tensors: The tensors of its weights file, under their names there.
    """

    config: dict[str, Json]
    tensors: Mapping[str, torch.Tensor]

    def peft_config(self) -> PeftConfig:
        """The PEFT config as it was read, so that PEFT need not read the file again.

        Raises:
            AdapterLoadError: It is none that this PEFT takes.
        """
        unwanted = {"runtime_config"}
        if "peft_version" not in {field.name for field in dataclasses.fields(PeftConfig)}:
            unwanted.add("peft_version")  # of which older versions of PEFT would warn
        known = {key: value for key, value in self.config.items() if key not in unwanted}
        try:
            config: PeftConfig = PeftConfig.from_peft_type(**known)
        except Exception as error:
            message = f"PEFT does not take its config ({type(error).__name__}: {error})"
            raise AdapterLoadError("adapters", message) from error
        return config


@attrs.frozen(kw_only=True)
class Source:
    """A saved state, read and checked.

    Attributes:
        folder: Where it was read from.
        manifest: The manifest, tensors of the sidecar filled in.
        adapters: The files of each adapter, by its name in the manifest.
    """

    folder: AdapterFolder
    manifest: Manifest
    adapters: Mapping[str, AdapterFiles]

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the folder's own adapter is a prompt."""
        peft_type = self.adapters[self.own_adapter].config.get("peft_type")
        classes: Mapping[Any, type[PeftConfig]] = PEFT_TYPE_TO_CONFIG_MAPPING
        known = classes.get(peft_type) if isinstance(peft_type, str) else None
        return known is not None and issubclass(known, PromptLearningConfig)

    @property
    def own_adapter(self) -> str:
        """The name of the adapter that is in the manifest's own folder."""
        records = self.manifest.sections["adapters"].adapters
        name: str = next(name for name, record in records.items() if record.folder == ".")
        return name


def read_source(folder: AdapterFolder, names: Collection[str] | None = None) -> Source:
    """Read a folder as one generation.

    Args:
        folder: The folder, which has a manifest.
        names: The adapters wanted beside the folder's own, by their names in the manifest;
            `None` for all.

    Raises:
        ValueError: There is no adapter of a name that is wanted.
        ManifestError: The manifest is missing or not what the format allows.
        IntegrityError: A file is not the one that was saved.
        AdapterMismatchError: The PEFT config on disk is not the one that was saved.
        SignatureError: The folder was opened with trusted keys, and is not as one of them signed.
    """
    return consistently(folder, lambda opened: _read(opened, names))


def _read(folder: AdapterFolder, names: Collection[str] | None) -> Source:
    """Read a folder once."""
    manifest = manifest_of(folder)
    check_folders(folder, manifest)
    records = manifest.sections["adapters"].adapters
    if unknown := sorted(set(names or ()) - records.keys()):
        raise ValueError(f"{folder.path} has no adapter {unknown[0]!r}; it has {sorted(records)}")
    wanted = {
        name: record
        for name, record in records.items()
        if names is None or name in names or record.folder == "."
    }
    folder.fetch(subfolders={record.folder for record in wanted.values()} - {"."})
    found = {name: _read_adapter(folder, name, record, manifest) for name, record in wanted.items()}
    sections = with_own_states(folder, _with_sidecar(folder, manifest))
    check_all(folder, {records[name].folder for name in found} - {"."})
    return Source(folder=folder, manifest=attrs.evolve(manifest, sections=sections), adapters=found)


def _read_adapter(
    folder: AdapterFolder, name: str, record: AdapterRecord, manifest: Manifest
) -> AdapterFiles:
    """Read config and weights of one adapter."""
    names = [in_folder(record.folder, file) for file in WEIGHTS_NAMES]
    weights = next((file for file in names if file in manifest.files), names[0])
    data = read_recorded(folder, weights, manifest.files.get(weights))
    path = str(folder.path / weights)
    tensors = parse_weights(path, data)
    check_tensors(path, tensors, record.tensors)
    config = read_config(folder, record)
    if mismatches := compare_config(name, record, config):
        raise AdapterMismatchError(Report(mismatches, ("adapters",)))
    refuse_imports(config)
    return AdapterFiles(config=config, tensors=tensors)


def _with_sidecar(folder: AdapterFolder, manifest: Manifest) -> dict[str, Any]:
    """The records of a manifest, their tensors read from the sidecar."""
    wanted: dict[str, SidecarTensor] = {}
    for tensor in sidecar_tensors(manifest.sections):
        if wanted.setdefault(tensor.tensor, tensor) != tensor:
            message = f"two different records of the sidecar's tensor {tensor.tensor!r}"
            raise ManifestDecodeError(str(folder.path / MANIFEST_NAME), message, field="sections")
    if not wanted:
        return dict(manifest.sections)
    data = read_recorded(folder, SIDECAR_NAME, manifest.files.get(SIDECAR_NAME))
    path = str(folder.path / SIDECAR_NAME)
    found = parse_weights(path, data)
    check_tensors(path, found, wanted)
    filled: dict[str, Any] = with_tensors(manifest.sections, found)
    return filled
