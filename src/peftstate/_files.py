"""What can be said of a saved state without loading a model, and without torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from peftstate import _diff
from peftstate._codec import encode
from peftstate._diff import ABSENT
from peftstate._digest import file_digest
from peftstate._folder import AdapterFolder, open_folder
from peftstate._report import FILES, Report
from peftstate._storage import MANIFEST_NAME
from peftstate.errors import PeftStateError
from peftstate.manifest import MAX_BYTES, FileRecord, Manifest, encode_sections
from peftstate.sections import SECTIONS

T = TypeVar("T")

_ATTEMPTS = 20
"""Times that a folder is read, if a save comes between."""
_PAUSE = 0.02
"""Seconds before it is read again."""


def read_manifest(source: str | os.PathLike[str], **hub: Any) -> Manifest:
    """Read the manifest of an adapter.

    Args:
        source: The adapter's folder, or the id of a repo on the Hub.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Raises:
        ManifestNotFoundError: There is none.
        ManifestDecodeError: It is not what the format allows.
        SchemaVersionError: It was written by a newer peftstate.
        IntegrityError: It was changed after it was written.
    """
    folder = open_folder(source, **hub)
    return consistently(folder, lambda: manifest_of(folder))


def consistently(
    folder: AdapterFolder, read: Callable[[], T], fits: Callable[[T], bool] = lambda _: True
) -> T:
    """Read a folder, and read it again as long as a save comes between.

    Args:
        folder: The folder.
        read: Reads it; an error, like what does not fit, may be due to such a save.
        fits: Whether what was read fits together.
    """
    for attempt in range(_ATTEMPTS):
        generation = folder.generation()
        try:
            result = read()
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


def verify_files(source: str | os.PathLike[str], **hub: Any) -> Report:
    """Compare the files of an adapter with the manifest: their sizes and SHA-256.

    Args:
        source: The adapter's folder, or the id of a repo on the Hub.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Returns:
        A mismatch for each file that is missing or has changed.

    Raises:
        ManifestError: The manifest cannot be used.
        IntegrityError: The manifest was changed after it was written.
    """
    folder = open_folder(source, **hub)
    return consistently(folder, lambda: _compare_files(folder), lambda report: report.ok)


def _compare_files(folder: AdapterFolder) -> Report:
    """Compare the files of a folder once."""
    manifest = manifest_of(folder)
    saved = {name: encode(record) for name, record in manifest.files.items()}
    found = {}
    for name in manifest.files:
        if folder.exists(name):
            data = folder.read_bytes(name)
            found[name] = encode(FileRecord(size=len(data), sha256=file_digest(data)))
    return Report(_diff.diff(FILES, saved, found), (FILES,))


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
