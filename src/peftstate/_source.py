"""What a load reads from a folder, each file once, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from peft import PeftConfig

from peftstate._codec import DecodeError, loads
from peftstate._diff import diff
from peftstate._files import consistently, manifest_of
from peftstate._folder import AdapterFolder
from peftstate._names import safe_name
from peftstate._report import Report
from peftstate._storage import ADAPTER_CONFIG_NAME, MANIFEST_NAME, SIDECAR_NAME, WEIGHTS_NAMES
from peftstate._weights import check_tensors, parse_weights
from peftstate.errors import (
    AdapterMismatchError,
    IntegrityError,
    ManifestDecodeError,
)
from peftstate.manifest import FileRecord, Manifest
from peftstate.sections import adapters
from peftstate.sections._tensors import sidecar_tensors, with_tensors

if TYPE_CHECKING:
    import torch

    from peftstate._diff import Json


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
        """The PEFT config as it was read, so that PEFT need not read the file again."""
        known = {key: value for key, value in self.config.items() if key != "runtime_config"}
        config: PeftConfig = PeftConfig.from_peft_type(**known)
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
        return bool(self.adapters[self.own_adapter].peft_config().is_prompt_learning)

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
    """
    return consistently(folder, lambda: _read(folder, names))


def _read(folder: AdapterFolder, names: Collection[str] | None) -> Source:
    """Read a folder once."""
    manifest = manifest_of(folder)
    _check_folders(manifest, str(folder.path / MANIFEST_NAME))
    records = manifest.sections["adapters"].adapters
    if unknown := sorted(set(names or ()) - records.keys()):
        raise ValueError(f"{folder.path} has no adapter {unknown[0]!r}; it has {sorted(records)}")
    found = {
        name: _read_adapter(folder, record, manifest)
        for name, record in records.items()
        if names is None or name in names or record.folder == "."
    }
    sections = _with_sidecar(folder, manifest)
    return Source(folder=folder, manifest=attrs.evolve(manifest, sections=sections), adapters=found)


def _check_folders(manifest: Manifest, path: str) -> None:
    """Refuse names in a manifest that could lead out of its folder."""
    records = manifest.sections["adapters"].adapters
    for name, record in records.items():
        try:
            if record.folder != ".":
                safe_name(record.folder)
        except ValueError as error:
            field = f"sections.adapters.adapters[{name}].folder"
            raise ManifestDecodeError(path, str(error), field=field) from None
    if sum(record.folder == "." for record in records.values()) != 1:
        message = "exactly one adapter must be in the manifest's own folder"
        raise ManifestDecodeError(path, message, field="sections.adapters.adapters")


def _read_adapter(
    folder: AdapterFolder, record: adapters.AdapterRecord, manifest: Manifest
) -> AdapterFiles:
    """Read config and weights of one adapter."""
    prefix = "" if record.folder == "." else f"{record.folder}/"
    weights = next(
        (name for name in WEIGHTS_NAMES if prefix + name in manifest.files), WEIGHTS_NAMES[0]
    )
    data = read_file(folder, prefix + weights, manifest.files.get(prefix + weights))
    tensors = parse_weights(prefix + weights, data)
    check_tensors(prefix + weights, tensors, record.tensors)
    return AdapterFiles(config=_read_config(folder, prefix, record), tensors=tensors)


def read_file(folder: AdapterFolder, name: str, record: FileRecord | None) -> bytes:
    """Read a file that must be there, of the recorded size.

    Raises:
        IntegrityError: It is missing, or of another size.
    """
    path = str(folder.path / name)
    saved = f"{record.size} bytes" if record else "a file"
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError:
        raise IntegrityError(path, saved, "no file") from None
    if record is not None and len(data) != record.size:
        raise IntegrityError(path, saved, f"{len(data)} bytes")
    return data


def _read_config(
    folder: AdapterFolder, prefix: str, record: adapters.AdapterRecord
) -> dict[str, Json]:
    """Read a PEFT config, and compare it with the record."""
    name = prefix + ADAPTER_CONFIG_NAME
    data, path = read_file(folder, name, None), str(folder.path / name)
    try:
        config = loads(data)
    except DecodeError as error:
        raise IntegrityError(path, "a PEFT config", f"something else ({error})") from None
    if not isinstance(config, dict):
        raise IntegrityError(path, "a PEFT config", "JSON that is not an object")
    found = adapters.canonical_fields(config)
    mismatches = diff("adapters", {"config": dict(record.config)}, {"config": found})
    if mismatches:
        raise AdapterMismatchError(Report(mismatches, ("adapters",)))
    return config


def _with_sidecar(folder: AdapterFolder, manifest: Manifest) -> dict[str, Any]:
    """The records of a manifest, their tensors read from the sidecar."""
    wanted = {tensor.tensor: tensor for tensor in sidecar_tensors(manifest.sections)}
    if not wanted:
        return dict(manifest.sections)
    data = read_file(folder, SIDECAR_NAME, manifest.files.get(SIDECAR_NAME))
    found = parse_weights(SIDECAR_NAME, data)
    check_tensors(SIDECAR_NAME, found, wanted)
    filled: dict[str, Any] = with_tensors(manifest.sections, found)
    return filled
