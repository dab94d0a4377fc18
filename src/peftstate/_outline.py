"""What a manifest says, in a few lines a section, for a person to read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import attrs

from peftstate._diff import Json, join, printable, step
from peftstate.manifest import encode_sections

if TYPE_CHECKING:
    from peftstate.manifest import Manifest

_MOST_ENTRIES = 16
"""How many entries of a mapping or a list are shown one by one."""
_LONGEST = 72
"""Characters of a value that are shown."""
_UNKNOWN = "neither restored nor compared by a load"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENSOR = frozenset({"digest", "dtype", "shape"})
_TABLE = frozenset({"default", "exceptions"})


@attrs.frozen
class Line:
    """One line of an outline.

    Attributes:
        field: The path of a field in its section.
        text: What is recorded there.
    """

    field: str
    text: str


def outline(manifest: Manifest) -> dict[str, list[Line]]:
    """The lines of each section, by its name, in the order of the sections.

    What is empty or was not there to be recorded is left out.
    """
    unknown = manifest.unknown
    return {
        name: [Line("not known", _UNKNOWN)]
        if name in unknown
        else [line for key, value in record.items() for line in _lines(step(key), value)]
        for name, record in encode_sections(manifest.sections).items()
    }


def heading(manifest: Manifest) -> str:
    """How a manifest came about, in a few words."""
    verb = "adopted" if manifest.unknown else "saved"
    return f"{verb} by peftstate {manifest.peftstate_version}, schema {manifest.schema_version}"


def _lines(field: str, value: Json) -> Iterator[Line]:
    """The lines of a value: one if it is short to say, else those of what is in it."""
    if _is_empty(value):
        return
    text = _text(value)
    if text is not None:
        yield Line(printable(field), printable(text))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _lines(join(field, step(key)), inner)
    else:
        for number, inner in enumerate(value):
            yield from _lines(join(field, step(number)), inner)


def _is_empty(value: Json) -> bool:
    """Whether there is nothing to say of a value."""
    return value is None or value in ({}, [], {"default": None, "exceptions": {}})


def _text(value: Json) -> str | None:
    """A value in a few words; `None` if its parts are to be shown one by one."""
    if isinstance(value, Mapping):
        return _text_of_mapping(value)
    if isinstance(value, list):
        if len(value) > _MOST_ENTRIES:
            return f"{len(value)} entries"
        return None if any(isinstance(item, Mapping | list) for item in value) else _joined(value)
    return _text_of_scalar(value)


def _text_of_mapping(value: Mapping[str, Json]) -> str | None:
    """A tensor, a table of defaults and exceptions, or a mapping that is long, in a few words."""
    if value.keys() >= _TENSOR:
        shape = " x ".join(map(str, value["shape"])) or "scalar"
        return f"{value['dtype']}, {shape}, digest {_text_of_scalar(value['digest'])}"
    if value.keys() == _TABLE:
        default, exceptions = value["default"], value["exceptions"]
        if isinstance(default, Mapping | list):
            return None
        more = f", {len(exceptions)} otherwise" if exceptions else ""
        return f"{_text_of_scalar(default)}{more}"
    if all(isinstance(item, Mapping) and item.keys() >= _TENSOR for item in value.values()):
        return "1 tensor" if len(value) == 1 else f"{len(value)} tensors"
    said = sum(not _is_empty(item) for item in value.values())
    return None if said <= _MOST_ENTRIES else f"{len(value)} entries"


def _text_of_scalar(value: Json) -> str:
    """A value that holds no others; digests and long texts are cut."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    text = str(value)
    if _DIGEST.fullmatch(text):
        return f"{text[:12]}…"
    return f"{text[:_LONGEST]}…" if len(text) > _LONGEST else text


def _joined(values: list[Json]) -> str:
    """A short list of scalars."""
    return ", ".join(map(_text_of_scalar, values))
