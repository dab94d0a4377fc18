"""Comparing the files of an adapter with its manifest, without loading them and without torch."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from peftstate import _diff
from peftstate._codec import encode
from peftstate._diff import ABSENT, Mismatch, printable
from peftstate._digest import file_digest
from peftstate._files import (
    check_folders,
    compare_config,
    consistently,
    manifest_of,
    read_config,
)
from peftstate._folder import AdapterFolder
from peftstate._names import in_folder
from peftstate._progress import progress
from peftstate._rank_files import RankFiles, rank_files
from peftstate._report import FILES, Report
from peftstate._signature import check_all, open_for_load
from peftstate._storage import ADAPTER_CONFIG_NAME, MANIFEST_NAME, SIGNATURE_NAME, WEIGHTS_NAMES
from peftstate.errors import IntegrityError
from peftstate.manifest import FileRecord, Manifest

if TYPE_CHECKING:
    from peftstate._diff import Json, Presence
    from peftstate._keys import TrustedKeys

_OF_A_BASE_MODEL = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
)
"""How transformers calls the weights of a whole model."""

_SHOWN = 12
"""Names that a note lists before it only counts the rest."""


def verify_files(
    source: str | os.PathLike[str], *, trusted_keys: TrustedKeys | None = None, **hub: Any
) -> Report:
    """Compare the files of an adapter with the manifest.

    Weights and sidecar are compared by size and SHA-256, PEFT configs by their fields. The folders
    of extra adapters are compared with the manifest here and with their own.

    Args:
        source: The adapter's folder, or the id of a repo on the Hub.
        trusted_keys: As in `PeftModel.from_pretrained`: a key of these must have signed it all.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Returns:
        A mismatch for each file that is missing, has changed or cannot be read. Its notes name
        the files beside them, of which the manifest says nothing.

    Raises:
        AdapterNotFoundError: There is no such folder, and the Hub is not to be reached.
        ManifestError: A manifest cannot be used.
        IntegrityError: A manifest was changed after it was written, or cannot be read.
        SignatureError: The folder is not as one of the trusted keys signed it.
    """
    folder = open_for_load(source, trusted_keys=trusted_keys, **hub)
    return consistently(folder, _compare, lambda report: report.ok)


def _compare(folder: AdapterFolder) -> Report:
    """Compare the files of a folder once, and those of the sub-folders of extra adapters."""
    mismatches: list[Mismatch] = []
    covered: set[str] = set()
    names: list[str] = []
    notes: list[str] = []
    for below, place, manifest in _folders(folder):
        names += [in_folder(below, name) for name in place.names()]
        if manifest is not None:
            # Root and sub-folder may both tell of a file in the sub-folder.
            found = _compare_folder(place, manifest, below)
            mismatches += [mismatch for mismatch in found if mismatch not in mismatches]
            covered |= {in_folder(below, name) for name in _files_of(manifest)}
            ranks = rank_files(place, manifest)
            mismatches += _of_ranks(ranks, below)
            names_of_ranks = (*ranks.belonging, *ranks.others, *ranks.damaged)
            covered |= {in_folder(below, name) for name in names_of_ranks}
            notes += _notes_of_ranks(ranks, below)
    check_all(folder)
    mismatches.sort(key=lambda mismatch: mismatch.section != FILES)
    notes += _notes([name for name in names if name not in covered])
    return Report(tuple(mismatches), (FILES, "adapters"), tuple(notes))


def _of_ranks(ranks: RankFiles, below: str) -> tuple[Mismatch, ...]:
    """The rank files that are damaged; each is sealed by itself."""
    saved: dict[str, Json | Presence] = {}
    found: dict[str, Json | Presence] = {}
    for name, error in ranks.damaged.items():
        file = in_folder(below, name)
        saved[file], found[file] = error.expected, error.actual
    return _diff.diff(FILES, saved, found)


def _notes_of_ranks(ranks: RankFiles, below: str) -> Iterator[str]:
    """What is to be said of the random generators of further ranks."""
    if ranks.others:
        names = _listed([in_folder(below, name) for name in ranks.others])
        yield f"{names}: random generators of ranks of another save, which no load restores"
    if ranks.missing:
        listed = _listed([str(rank) for rank in ranks.missing])
        where = "the folder" if below == "." else below
        yield f"there are no random generators of rank {listed} in {where}; no load restores these"


def _folders(folder: AdapterFolder) -> Iterator[tuple[str, AdapterFolder, Manifest | None]]:
    """The folder and those of its extra adapters: name, folder, and the manifest that is in it."""
    root = manifest_of(folder)
    check_folders(folder, root)
    records = root.sections["adapters"].adapters.values()
    folder.fetch(subfolders={record.folder for record in records} - {"."})
    yield ".", folder, root
    for record in records:
        if record.folder != ".":
            place = folder.subfolder(record.folder)
            manifest = manifest_of(place) if place.exists(MANIFEST_NAME) else None
            if manifest is not None:
                check_folders(place, manifest)
            yield record.folder, place, manifest


def _files_of(manifest: Manifest) -> Iterator[str]:
    """The files that a manifest says something of, itself included."""
    yield from (MANIFEST_NAME, SIGNATURE_NAME, *manifest.files)
    for record in manifest.sections["adapters"].adapters.values():
        yield in_folder(record.folder, ADAPTER_CONFIG_NAME)


def _compare_folder(folder: AdapterFolder, manifest: Manifest, below: str) -> tuple[Mismatch, ...]:
    """Compare the files of a folder with the manifest in it.

    Args:
        folder: The folder.
        manifest: Its manifest.
        below: The folder's name in the one that was opened.
    """
    saved: dict[str, Json | Presence] = {}
    found: dict[str, Json | Presence] = {}
    differing: list[Mismatch] = []
    for name, record in manifest.files.items():
        saved[in_folder(below, name)] = encode(record)
        with progress(f"Hashing {printable(name)}", record.size, "B") as reach:
            found[in_folder(below, name)] = _described(folder, name, reach)
    for name, record in manifest.sections["adapters"].adapters.items():
        try:
            differing += compare_config(name, record, read_config(folder, record))
        except IntegrityError as error:
            file = in_folder(below, in_folder(record.folder, ADAPTER_CONFIG_NAME))
            saved[file], found[file] = error.expected, error.actual
    return (*_diff.diff(FILES, saved, found), *differing)


def _described(folder: AdapterFolder, name: str, reach: Callable[[int], object]) -> Json | Presence:
    """A file as a manifest would describe it, or what is there in its place."""
    try:
        data = folder.read(name)
    except FileNotFoundError:
        return ABSENT
    except IntegrityError as error:
        return error.actual
    return encode(FileRecord(size=len(data), sha256=file_digest(data, reach)))


def _notes(beside: Collection[str]) -> Iterator[str]:
    """What is to be said of files that were not saved with the state."""
    weights = [name for name in beside if name.rpartition("/")[2] in WEIGHTS_NAMES]
    if weights:
        yield (
            f"{_listed(weights)}: weights that were not saved with this state; "
            "programs that do not read the manifest may load them"
        )
    model = [name for name in beside if _is_of_a_base_model(name)]
    if model:
        yield (
            f"{_listed(model)}: weights of a whole model beside {ADAPTER_CONFIG_NAME}. "
            "transformers applies the adapter to them, which is once too often if it was merged "
            "into them; keep them in a folder of their own"
        )
    others = [name for name in beside if name not in weights and name not in model]
    if others:
        yield f"not covered by the manifest: {_listed(others)}"


def _is_of_a_base_model(name: str) -> bool:
    """Whether transformers would take a file for a whole model's weights."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _OF_A_BASE_MODEL)


def _listed(names: Collection[str]) -> str:
    """Names in a sentence, of many only the first."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
