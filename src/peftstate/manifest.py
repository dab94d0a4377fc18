"""The manifest: what it holds, and how it is written and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from peftstate import __version__
from peftstate._codec import DecodeError, canonical, decode, dumps, encode, loads
from peftstate._diff import Json, join, printable, step
from peftstate._digest import seal_digest
from peftstate._names import check_twins, safe_name
from peftstate._upgrades import UPGRADES
from peftstate.errors import IntegrityError, ManifestDecodeError, SchemaVersionError
from peftstate.sections import SECTIONS

SCHEMA_VERSION = 3
"""The schema that is written; all from 1 up to it are read."""

MAX_BYTES = 64 * 1024 * 1024
"""Size that a manifest may have; that of a model with 10,000 tensors has 2 MB."""

_KEYS = frozenset({"schema_version", "peftstate_version", "sections", "files", "digest"})


@attrs.frozen(kw_only=True)
class FileRecord:
    """A file beside the manifest.

    Attributes:
        size: In bytes.
        sha256: SHA-256 of its content, as Git LFS and the Hub state it.
    """

    size: int
    sha256: str


@attrs.frozen(kw_only=True)
class Manifest:
    """The saved state of a model.

    Attributes:
        sections: The record of each section, by its name.
        files: The files that the state is in, by their names.
        peftstate_version: The version that wrote it.
        schema_version: The schema that it was written in.
    """

    sections: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    peftstate_version: str = __version__
    schema_version: int = SCHEMA_VERSION

    @property
    def unknown(self) -> tuple[str, ...]:
        """Of an adapter that was adopted, the sections of which nobody knows any more.

        Of one that was saved there are none: its random generators were there to be recorded.
        """
        unknown = tuple(
            section.name
            for section in SECTIONS
            if section.name in self.sections and not section.is_known(self.sections[section.name])
        )
        return unknown if "rng" in unknown else ()

    def _repr_html_(self) -> str:
        """The manifest as a notebook shows it."""
        from peftstate._html import manifest_html

        return manifest_html(self)

    def to_json(self) -> bytes:
        """The manifest as it is written: the same bytes for the same state.

        Raises:
            ValueError: It is so large, or has such names, that no load would take it.
        """
        content = self._content()
        data = dumps({**content, "digest": seal_digest(canonical(content))})
        if len(data) > MAX_BYTES:
            raise ValueError(f"the manifest would have {len(data)} bytes; it may have {MAX_BYTES}")
        loads(data)
        check_twins(self.files)
        return data

    @property
    def digest(self) -> str:
        """The seal, a BLAKE3 digest of all the rest: equal for equal state only.

        A manifest that was read in an older schema has the seal that it would be written with now.
        """
        return seal_digest(canonical(self._content()))

    def _content(self) -> dict[str, Json]:
        """The manifest as JSON, without its seal."""
        return {
            "schema_version": self.schema_version,
            "peftstate_version": self.peftstate_version,
            "sections": encode_sections(self.sections),
            "files": {name: encode(record) for name, record in self.files.items()},
        }

    @classmethod
    def from_json(cls, data: bytes, *, path: str) -> Manifest:
        """Read a manifest.

        Args:
            data: What `to_json` gave, or what somebody made of it.
            path: Where it comes from, for errors.

        Raises:
            ManifestDecodeError: It is not what the format allows; `field` says where.
            SchemaVersionError: It was written by a newer peftstate.
            IntegrityError: It was changed after it was written.
        """
        try:
            content = _checked(loads(data), path)
            return cls(
                sections=_decode_sections(content["sections"]),
                files=_decode_files(content["files"]),
                peftstate_version=_text(content["peftstate_version"], "peftstate_version"),
                schema_version=SCHEMA_VERSION,
            )
        except DecodeError as error:
            raise ManifestDecodeError(path, str(error), field=printable(error.field)) from None


def encode_sections(sections: Mapping[str, Any]) -> dict[str, dict[str, Json]]:
    """The records of sections as JSON, in the order of the sections."""
    return {
        section.name: section.encode(sections[section.name])
        for section in SECTIONS
        if section.name in sections
    }


def _checked(value: Json, path: str) -> dict[str, Json]:
    """Check the schema version and the seal, and bring an old manifest up to date."""
    if not isinstance(value, dict):
        raise DecodeError("the manifest is not an object")
    version = value.get("schema_version")
    if type(version) is not int:
        raise DecodeError("expected an integer", field="schema_version")
    if not 1 <= version <= SCHEMA_VERSION:
        raise SchemaVersionError(path, found=version, supported=SCHEMA_VERSION)
    for key in sorted(_KEYS ^ value.keys()):
        raise DecodeError("is missing" if key in _KEYS else "unknown key", field=step(key))
    content = {key: item for key, item in value.items() if key != "digest"}
    seal = seal_digest(canonical(content))
    if value["digest"] != seal:
        raise IntegrityError(path, f"digest {value['digest']}", f"digest {seal}")
    for number in range(version, SCHEMA_VERSION):
        content = UPGRADES[number](content)
    return content


def _decode_sections(value: Json) -> dict[str, Any]:
    """The records of all sections."""
    if not isinstance(value, dict):
        raise DecodeError("expected an object", field="sections")
    names = {section.name for section in SECTIONS}
    optional = {section.name for section in SECTIONS if section.is_optional}
    for key in sorted((names ^ value.keys()) - optional):
        message = "is missing" if key in names else "unknown section"
        raise DecodeError(message, field=join("sections", step(key)))
    records = {}
    for section in SECTIONS:
        if section.name not in value:
            continue
        try:
            records[section.name] = section.decode(value[section.name])
        except DecodeError as error:
            field = join(f"sections.{section.name}", error.field)
            raise DecodeError(str(error), field=field) from None
    return records


def _decode_files(value: Json) -> dict[str, FileRecord]:
    """The records of the files."""
    if not isinstance(value, dict):
        raise DecodeError("expected an object", field="files")
    records = {}
    for name, item in value.items():
        try:
            records[safe_name(name)] = decode(item, FileRecord)
        except ValueError as error:
            inner = error.field if isinstance(error, DecodeError) else ""
            raise DecodeError(str(error), field=join(f"files[{name}]", inner)) from None
    try:
        check_twins(records)
    except ValueError as error:
        raise DecodeError(str(error), field="files") from None
    return records


def _text(value: Json, field: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise DecodeError("expected a string", field=field)
    return value
