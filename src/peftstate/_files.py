"""What can be said of a saved state without loading a model, and without torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from peftstate import _diff
from peftstate._codec import DecodeError, loads
from peftstate._diff import ABSENT, Mismatch, printable
from peftstate._folder import AdapterFolder
from peftstate._names import in_folder, safe_name
from peftstate._report import Report
from peftstate._signature import open_for_load, under_signature
from peftstate._storage import ADAPTER_CONFIG_NAME, MANIFEST_NAME, SIGNATURE_NAME
from peftstate.errors import (
    IntegrityError,
    ManifestDecodeError,
    NotCachedError,
    PeftStateError,
)
from peftstate.manifest import MAX_BYTES, FileRecord, Manifest, encode_sections
from peftstate.sections import SECTIONS, adapters
from peftstate.sections._adapter_config import canonical_fields

if TYPE_CHECKING:
    from peftstate._diff import Json
    from peftstate._keys import TrustedKeys

T = TypeVar("T")

_ATTEMPTS = 20
"""Times that a folder is read, if a save comes between."""
_PAUSE = 0.02
"""Seconds before it is read again."""


def read_manifest(
    source: str | os.PathLike[str], *, trusted_keys: TrustedKeys | None = None, **hub: Any
) -> Manifest:
    """Read the manifest of an adapter.

    Args:
        source: The adapter's folder, or the id of a repo on the Hub, of which no weights are
            downloaded.
        trusted_keys: As in `PeftModel.from_pretrained`: a key of these must have signed it.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Raises:
        AdapterNotFoundError: There is no such folder, and the Hub is not to be reached.
        ManifestNotFoundError: There is none.
        ManifestDecodeError: It is not what the format allows.
        SchemaVersionError: It was written by a newer peftstate.
        IntegrityError: It was changed after it was written.
        SignatureError: It was not signed with a key that is trusted.
    """
    small = (ADAPTER_CONFIG_NAME, MANIFEST_NAME, SIGNATURE_NAME)
    folder = open_for_load(source, trusted_keys=trusted_keys, patterns=small, **hub)
    return consistently(folder, manifest_of)


def consistently(
    folder: AdapterFolder,
    read: Callable[[AdapterFolder], T],
    fits: Callable[[T], bool] = lambda _: True,
) -> T:
    """Read a folder, and read it again as long as a save comes between.

    Args:
        folder: The folder.
        read: Reads it, as one that gives only what is signed if the folder was opened with trusted
            keys; an error, like what does not fit, may be due to such a save.
        fits: Whether what was read fits together.
    """
    for attempt in range(_ATTEMPTS):
        generation = folder.generation()
        try:
            result = read(under_signature(folder))
            if fits(result) or attempt + 1 == _ATTEMPTS or folder.generation() == generation:
                return result
        except (PeftStateError, FileNotFoundError):
            if attempt + 1 == _ATTEMPTS or folder.generation() == generation:
                raise
        time.sleep(_PAUSE)
    raise AssertionError("unreachable")


def manifest_of(folder: AdapterFolder) -> Manifest:
    """Read the manifest of a folder, without its sidecar."""
    path = str(folder.path / MANIFEST_NAME)
    return Manifest.from_json(folder.read_bytes(MANIFEST_NAME, limit=MAX_BYTES), path=path)


def check_folders(folder: AdapterFolder, manifest: Manifest) -> None:
    """Refuse a manifest whose adapters would be outside of its folder.

    Raises:
        ManifestDecodeError: They would be, or none is in the folder itself.
    """
    path = str(folder.path / MANIFEST_NAME)
    records = manifest.sections["adapters"].adapters
    for name, record in records.items():
        try:
            safe_name(in_folder(record.folder, ADAPTER_CONFIG_NAME))
        except ValueError as error:
            field = f"sections.adapters.adapters[{printable(name)}].folder"
            raise ManifestDecodeError(path, str(error), field=field) from None
    if sum(record.folder == "." for record in records.values()) != 1:
        message = "exactly one adapter must be in the manifest's own folder"
        raise ManifestDecodeError(path, message, field="sections.adapters.adapters")


def read_recorded(folder: AdapterFolder, name: str, record: FileRecord | None) -> memoryview:
    """Read a file that must be there, of the recorded size.

    Raises:
        IntegrityError: It is missing, of another size, or cannot be read.
    """
    try:
        return folder.read(name, size=record.size if record else None)
    except FileNotFoundError:
        saved = f"{record.size} bytes" if record else "a file"
        error = IntegrityError if folder.commit is None else NotCachedError
        raise error(str(folder.path / name), saved, error.absent) from None


def read_config(folder: AdapterFolder, record: adapters.AdapterRecord) -> dict[str, Json]:
    """Read the PEFT config of an adapter.

    Raises:
        IntegrityError: It is missing, no such config, or cannot be read.
    """
    name = in_folder(record.folder, ADAPTER_CONFIG_NAME)
    path = str(folder.path / name)
    try:
        config = loads(folder.read_bytes(name, limit=MAX_BYTES))
    except FileNotFoundError:
        raise IntegrityError(path, "a file", "no file") from None
    except DecodeError as error:
        raise IntegrityError(path, "a PEFT config", f"something else ({error})") from None
    if not isinstance(config, dict):
        raise IntegrityError(path, "a PEFT config", "JSON that is not an object")
    return config


def compare_config(
    name: str, record: adapters.AdapterRecord, config: dict[str, Json]
) -> tuple[Mismatch, ...]:
    """The fields of a PEFT config that are not as the manifest has them.

    Args:
        name: The adapter's name in the manifest.
        record: The adapter's record there.
        config: What was read.
    """
    saved, found = dict(record.config), canonical_fields(config)
    return _diff.diff(
        "adapters", {"adapters": {name: {"config": saved}}}, {"adapters": {name: {"config": found}}}
    )


def diff(saved: Manifest, found: Manifest) -> Report:
    """Compare two manifests, section by section.

    Args:
        saved: The one whose values a mismatch calls ``saved``.
        found: The other one.
    """
    first, second = encode_sections(saved.sections), encode_sections(found.sections)
    mismatches = [
        mismatch
        for section in SECTIONS
        for mismatch in _diff.diff(
            section.name, first.get(section.name, ABSENT), second.get(section.name, ABSENT)
        )
    ]
    return Report(tuple(mismatches), tuple(section.name for section in SECTIONS))
