"""What differs between two states, field by field.

Works on plain JSON values, so that a manifest on disk, a live capture and another manifest all
compare in the same way.
"""

from __future__ import annotations

import enum
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

Json: TypeAlias = Any
"""A JSON value: `None`, `bool`, `int`, `float`, `str`, a list or a mapping of them."""


class Presence(enum.Enum):
    """Whether a key or an item is there at all; stands in for its value in a mismatch."""

    PRESENT = "present"
    ABSENT = "absent"

    def __repr__(self) -> str:
        return self.value


PRESENT = Presence.PRESENT
ABSENT = Presence.ABSENT


class _Short(reprlib.Repr):
    """A `repr` that is short whatever the value."""

    def __init__(self) -> None:
        super().__init__()  # takes these as arguments from Python 3.12 on
        self.maxlevel, self.maxlist, self.maxdict = 3, 8, 8
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_str(self, x: str, level: int) -> str:
        """A text; of a digest the beginning."""
        if _DIGEST.fullmatch(x):
            return f"{x[:_DIGEST_SHOWN]}…"
        return super().repr_str(x, level)


_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGEST_SHOWN = 12
_LONGEST = 120
"""Characters of a value that are shown."""
_SHORT = _Short()


def shown(value: Json | Presence) -> str:
    """A value in a message: of a digest the beginning, and a line of what is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


@attrs.frozen
class Mismatch:
    """One field that differs.

    Attributes:
        section: Name of the section, such as ``"quantization"``.
        field: Path of the field inside the section, such as ``"default.quant_type"``; the keys of
            mappings that are no identifiers stand in brackets: ``"tensors[model.norm.weight]"``.
        saved: The value in the manifest, or `ABSENT`.
        found: The value of the live model (or of the second manifest), or `ABSENT`.
    """

    section: str
    field: str
    saved: Json | Presence
    found: Json | Presence

    @property
    def path(self) -> str:
        """Section and field in one: ``"quantization.default.quant_type"``."""
        return join(self.section, self.field)

    def __str__(self) -> str:
        return f"{printable(self.path)}: saved {shown(self.saved)}, found {shown(self.found)}"


def join(path: str, key: str) -> str:
    """Append one step to a field path."""
    if not key or not path or key.startswith("["):
        return path + key
    return f"{path}.{key}"


def step(key: str | int) -> str:
    """One step of a field path: ``name`` for an identifier, ``[key]`` for anything else."""
    return key if isinstance(key, str) and key.isidentifier() else f"[{key}]"


def printable(text: str) -> str:
    """A text of somebody else's for a message, without what a terminal would obey."""
    return text if text.isprintable() else repr(text)[1:-1]


def steps(path: str) -> list[str]:
    """The single steps of a field path, brackets taken off."""
    return [key or name for key, name in re.findall(r"\[([^\]]*)(?:\]|$)|([^.\[]+)", path)]


def diff(section: str, saved: Json, found: Json) -> tuple[Mismatch, ...]:
    """Compare two JSON values of one section.

    Args:
        section: Name of the section that the mismatches will bear.
        saved: The value in the manifest.
        found: The value to compare with it.

    Returns:
        One `Mismatch` for each leaf that differs, in the order of the keys.
    """
    return tuple(_differences(section, "", saved, found))


def _differences(section: str, path: str, saved: Json, found: Json) -> Iterator[Mismatch]:
    """Walk two values side by side."""
    if _same(saved, found):
        return
    if isinstance(saved, Mapping) and isinstance(found, Mapping):
        for key in sorted(saved.keys() | found.keys()):
            field = join(path, step(key))
            yield from _differences(section, field, saved.get(key, ABSENT), found.get(key, ABSENT))
    elif _is_set_of_names(saved) and _is_set_of_names(found) and set(saved) != set(found):
        names = set(saved)
        for name in sorted(names ^ set(found)):
            there = (PRESENT, ABSENT) if name in names else (ABSENT, PRESENT)
            yield Mismatch(section, f"{path}[{name}]", *there)
    else:
        yield Mismatch(section, path, saved, found)


def _is_set_of_names(value: Json | Presence) -> bool:
    """Whether a value is a list of different strings."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(item, str) for item in value)
        and len(set(value)) == len(value)
    )


SCALARS = (str, int, float, bool, type(None))
"""The types of JSON values that hold no others."""


def _same(saved: Json | Presence, found: Json | Presence) -> bool:
    """Equality that tells `True` from `1` and `1` from `1.0`, as the manifest does."""
    if type(saved) in SCALARS:
        return type(saved) is type(found) and saved == found
    if isinstance(saved, Sequence):
        return (
            isinstance(found, Sequence)
            and not isinstance(found, str)
            and len(saved) == len(found)
            and all(map(_same, saved, found))
        )
    if isinstance(saved, Mapping) and isinstance(found, Mapping):
        return saved.keys() == found.keys() and all(_same(saved[key], found[key]) for key in saved)
    return saved is found  # what is not there
