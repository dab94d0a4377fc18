"""The files with the random generators of further ranks, when several processes save one model.

Each rank writes its own, when it can and without asking the others, so the manifest cannot name
their digests. A file is sealed by itself, and says which save it belongs to by a digest of the
adapters' tensors, which are the same on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import attrs

from peftstate._codec import DecodeError, dumps, loads
from peftstate._diff import Json
from peftstate._digest import seal_digest
from peftstate._folder import AdapterFolder
from peftstate._upgrades import UPGRADES
from peftstate.errors import IntegrityError, SchemaVersionError
from peftstate.manifest import SCHEMA_VERSION, Manifest
from peftstate.sections.rng import SECTION, RankRecord, RngRecord

UNSEALED = "0" * 64
"""What stands for the digest in the bytes that it is over."""
METADATA = "__metadata__"
MAX_BYTES = 16 * 1024 * 1024
"""Size that a file may have; one has 16 KB, and a few KB more for each device."""

_NAME = re.compile(r"peftstate\.rank-(\d{5,})-of-(\d{5,})\.tensors")
_KEYS = {"schema_version", "sections"}


def rank_file_name(rank: int, world_size: int) -> str:
    """The name of a rank's file."""
    return f"peftstate.rank-{rank:05}-of-{world_size:05}.tensors"


def rank_of_name(name: str) -> tuple[int, int] | None:
    """The rank and the number of processes that a file's name tells; `None` for other files."""
    found = _NAME.fullmatch(name)
    if found is None or rank_file_name(int(found[1]), int(found[2])) != name:
        return None
    return int(found[1]), int(found[2])


def stale(names: Collection[str], world_size: int) -> Iterator[str]:
    """The rank files that no process of a save writes, since it has another number of them.

    Those of the same number stay: a rank may just have written the one of this save.
    """
    for name in names:
        of_name = rank_of_name(name)
        if of_name is not None and (world_size == 1 or of_name[1] != world_size):
            yield name


def metadata_of(record: RngRecord) -> dict[str, str]:
    """What the header of a rank's file says beside its tensors, not sealed yet."""
    sections: Json = {SECTION.name: SECTION.encode(record)}
    content: Json = {"schema_version": SCHEMA_VERSION, "sections": sections}
    return {"peftstate": dumps(content).decode(), "digest": UNSEALED}


def sealed(data: bytes) -> bytes:
    """A file with the digest of all its bytes in the place of `UNSEALED`."""
    if data.count(UNSEALED.encode()) != 1:
        raise ValueError("there is not exactly one place for the seal")
    return data.replace(UNSEALED.encode(), seal_digest(data).encode())


def read_rank_file(data: bytes, *, path: str) -> RngRecord:
    """The record in a rank's file, whose tensors are not parsed.

    Args:
        data: What was in the file.
        path: Where it comes from, for errors.

    Raises:
        IntegrityError: It is no such file, or was changed after it was written.
        SchemaVersionError: It was written by a newer peftstate.
    """
    try:
        metadata = _metadata(data)
        _check_seal(data, metadata["digest"], path)
        return _decode(loads(metadata["peftstate"].encode()), path)
    except DecodeError as error:
        found = f"something else ({f'{error.field}: ' if error.field else ''}{error})"
        raise IntegrityError(path, "the random state of a rank", found) from None


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file.

    Raises:
        DecodeError: There is none, or it is not a rank's.
    """
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        raise DecodeError("no header of a safetensors file")
    header = loads(data[8 : 8 + length])
    metadata = header.get(METADATA) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.keys() != {"peftstate", "digest"}:
        raise DecodeError("a header without the metadata of a rank")
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    if texts.keys() != metadata.keys():
        raise DecodeError("metadata that is no text")
    return texts


def _check_seal(data: bytes, digest: str, path: str) -> None:
    """Hold a file to the digest that it states of itself.

    Raises:
        IntegrityError: It has another one.
    """
    stated = f'"digest":"{digest}"'.encode()
    place = f'"digest":"{UNSEALED}"'.encode()
    found = seal_digest(data.replace(stated, place, 1))
    if found != digest:
        raise IntegrityError(path, f"digest {digest}", f"digest {found}")


def _decode(content: Json, path: str) -> RngRecord:
    """The record, brought up to date.

    Raises:
        DecodeError: It is no such record.
        SchemaVersionError: It is of a newer schema.
    """
    if not isinstance(content, dict) or content.keys() != _KEYS:
        raise DecodeError("not the record of a rank")
    version = content["schema_version"]
    if type(version) is not int or version < 1:
        raise DecodeError("expected an integer", field="schema_version")
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(path, found=version, supported=SCHEMA_VERSION)
    for number in range(version, SCHEMA_VERSION):
        content = UPGRADES[number](content)
    sections = content["sections"]
    if not isinstance(sections, dict) or sections.keys() != {SECTION.name}:
        raise DecodeError("expected the section rng alone", field="sections")
    return SECTION.decode(sections[SECTION.name])


@attrs.frozen(kw_only=True)
class RankFiles:
    """The rank files beside a manifest, by what they are to it.

    Attributes:
        belonging: Names of those of its save.
        others: Names of those of another save.
        damaged: What is wrong with each of the rest, by name.
        missing: The ranks of its save that have none.
    """

    belonging: tuple[str, ...]
    others: tuple[str, ...]
    damaged: dict[str, IntegrityError]
    missing: tuple[int, ...]


def rank_files(folder: AdapterFolder, manifest: Manifest) -> RankFiles:
    """Look at the rank files in a folder.

    Args:
        folder: The folder.
        manifest: Its manifest.
    """
    saved: RankRecord | None = manifest.sections[SECTION.name].process
    belonging: list[str] = []
    others: list[str] = []
    damaged: dict[str, IntegrityError] = {}
    ranks = set() if saved is None else set(range(saved.world_size)) - {saved.rank}
    for name in folder.names():
        of_name = rank_of_name(name)
        if of_name is None:
            continue
        try:
            found = rank_state(folder, name, saved)
        except IntegrityError as error:
            damaged[name] = error
            ranks.discard(of_name[0])
            continue
        (others if found is None else belonging).append(name)
        if found is not None:
            ranks.discard(of_name[0])
    return RankFiles(
        belonging=tuple(belonging),
        others=tuple(others),
        damaged=damaged,
        missing=tuple(sorted(ranks)),
    )


def rank_state(
    folder: AdapterFolder, name: str, saved: RankRecord | None
) -> tuple[RngRecord, bytes] | None:
    """Read a rank's file.

    Args:
        folder: The folder.
        name: The file, which has the name of one.
        saved: What the manifest says of the processes that saved.

    Returns:
        The record, and the file's bytes; `None` if it is not of the manifest's save.

    Raises:
        IntegrityError: It is damaged.
        FileNotFoundError: There is none.
        SchemaVersionError: It was written by a newer peftstate.
    """
    path = str(folder.path / name)
    data = folder.read_bytes(name, limit=MAX_BYTES)
    record = read_rank_file(data, path=path)
    process = record.process
    of_name = rank_of_name(name)
    if process is None or of_name != (process.rank, process.world_size):
        told = "of no rank" if process is None else f"of rank {process.rank}"
        raise IntegrityError(path, "the random state of the rank in its name", f"one {told}")
    if saved is None or process != attrs.evolve(saved, rank=process.rank):
        return None
    return record, data
