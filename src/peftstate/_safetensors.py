"""Safetensors files that were read already, without torch and without a copy.

The library of that name copies all tensors out of bytes, or maps a file that others may write to.
A load that reads an adapter once, and checks what it then uses, wants neither. The checks are that
library's (`safetensors/src/tensor.rs::SafeTensors::read_metadata` and `Metadata::validate`), and
more: no name twice, no unknown key, no header that takes long to parse.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._codec import loads
from peftstate._digest import pieces_digest

if TYPE_CHECKING:
    from io import BufferedReader

    from typing_extensions import Buffer

MAX_HEADER = 32 * 1024 * 1024
"""Bytes of the header; that of 100,000 tensors has 15 MB. safetensors takes 100 MB: 1.4 million
empty tensors, for which it needs 5 s and 1 GB."""
MAX_TENSORS = 2**17
"""Tensors in a file; LoRA on every expert of the largest mixtures has 90,000."""
MAX_DIMENSIONS = 64
"""Dimensions of a tensor, as many as torch has."""
_AT_ONCE = 16 * 1024 * 1024
"""Bytes of an open file that are read at a time."""
_SHOWN = 80
"""Characters of a value that a message shows."""
_LENGTH = 8
"""Bytes at the beginning of a file that say how long its header is."""

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""dtypes of the format → their names in torch, and the bytes of an element
(`safetensors/torch.py::_TYPES`)."""


@attrs.frozen
class Stored:
    """A tensor in a file.

    Attributes:
        dtype: Name of the dtype as torch writes it.
        shape: The shape.
        data: The elements, in row-major order and little-endian: a part of what was read.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@attrs.frozen
class _Place:
    """What a header says of a tensor; where it begins and ends, in bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stored(data: Buffer) -> dict[str, Stored]:
    """The tensors of a file, in the order of their bytes.

    Args:
        data: Its content.

    Raises:
        ValueError: It is no such file, or its header is too large.
    """
    content = memoryview(data).cast("B")
    body = _body(bytes(content[:_LENGTH]), len(content))
    places = _places(bytes(content[_LENGTH:body]), len(content) - body)
    return {
        name: Stored(place.dtype, place.shape, content[body + place.begin : body + place.end])
        for name, place in places.items()
    }


def stored_digests(file: BufferedReader) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """The tensors of a file that is open: name, dtype, shape and digest of each.

    No more of it than `_AT_ONCE` bytes is in memory at a time.

    Raises:
        ValueError: It is no such file, or its header is too large.
    """
    size = os.fstat(file.fileno()).st_size
    length = file.read(_LENGTH)
    body = _body(length, size)
    places = _places(file.read(body - _LENGTH), size - body)
    memory = memoryview(bytearray(min(_AT_ONCE, size - body)))
    for name, place in places.items():
        pieces = _pieces(file, place.end - place.begin, memory)
        yield name, place.dtype, place.shape, pieces_digest(place.dtype, place.shape, pieces)


def _pieces(file: BufferedReader, size: int, memory: memoryview) -> Iterator[memoryview]:
    """The next bytes of a file, in memory that the next piece takes."""
    for start in range(0, size, len(memory) or 1):
        piece = memory[: size - start]
        if file.readinto(piece) != len(piece):
            raise ValueError("the file ends early")
        yield piece


def _body(length: bytes, size: int) -> int:
    """Where the tensors of a file begin, by its first bytes and its size."""
    body = _LENGTH + int.from_bytes(length, "little")
    if body > MAX_HEADER:
        raise ValueError(f"a header of {body - _LENGTH} bytes; it may have {MAX_HEADER}")
    if body > size or body <= _LENGTH:
        raise ValueError(f"a header of {body - _LENGTH} bytes in a file of {size}")
    return body


def _places(header: bytes, size: int) -> dict[str, _Place]:
    """The tensors that a header describes, in the order of their bytes, which are all there are."""
    found: dict[str, _Place] = {}
    reached = 0
    for name, entry in _entries(header):
        place = _place(name, entry)
        if place.begin != reached:
            raise ValueError(f"{_shown(name)} begins at byte {place.begin}, where none ends")
        found[name] = place
        reached = place.end
    if reached != size:
        raise ValueError(f"{size} bytes of tensors, of which {reached} are described")
    return found


def _entries(header: bytes) -> list[tuple[str, Any]]:
    """What a header says of each tensor, in the order of their bytes."""
    # each tensor is an object, beside which there are the header and its metadata; before parsing,
    # braces in names cannot be told from these
    if header.count(b"{") > MAX_TENSORS + 2:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    entries = loads(header)
    if not isinstance(entries, dict):
        raise ValueError("a header that is no object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata that is no object of strings")
    for name, entry in entries.items():
        _check_entry(name, entry)
    return sorted(entries.items(), key=lambda item: item[1]["data_offsets"])


def _check_entry(name: str, entry: Any) -> None:
    """Refuse what does not describe a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_shown(name)} is not described by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{_shown(name)} has the unknown dtype {_shown(entry['dtype'])}")
    if len(_naturals(name, entry["shape"])) > MAX_DIMENSIONS:
        raise ValueError(f"{_shown(name)} has more than {MAX_DIMENSIONS} dimensions")
    if len(_naturals(name, entry["data_offsets"])) != len(("begin", "end")):
        raise ValueError(f"{_shown(name)} does not begin and end at a byte")


def _naturals(name: str, value: Any) -> list[int]:
    """A list of numbers, none below 0."""
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise ValueError(f"{_shown(name)} has {_shown(value)} for numbers")
    return value


def _place(name: str, entry: dict[str, Any]) -> _Place:
    """A tensor that a header describes."""
    dtype, size = DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if end - begin != size * math.prod(shape):
        raise ValueError(f"{_shown(name)} of shape {_shown(shape)} has bytes {begin} to {end}")
    return _Place(dtype, shape, begin, end)


def _shown(value: Any) -> str:
    """A value for a message, as much of it as fits."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
