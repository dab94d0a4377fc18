"""Records to JSON values and back: strict, with the path of what is wrong.

cattrs does the walking. Its default converter coerces (``"1"`` for an `int`); this one takes a
value only in the type that the record names, and refuses keys that the record does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.cols import is_mapping
from cattrs.errors import AttributeValidationNote, BaseValidationError, ForbiddenExtraKeysError
from cattrs.gen import (
    AttributeOverride,
    make_dict_structure_fn,
    make_dict_unstructure_fn,
    override,
)

from peftstate._diff import SCALARS, Json, join, step

R = TypeVar("R", bound=attrs.AttrsInstance)

MAX_DEPTH = 24
"""Levels of nesting that a manifest may have."""
MAX_VALUES = 2**21
"""Values that a manifest may have; that of a model with 10,000 tensors has 60,000. An empty list
takes 2 bytes of a file and 56 of memory."""
MAX_KEY = 2**12
"""Characters of a key, which may be a tensor's name or a token."""
MAX_TEXT = 2**20
"""Characters of a string, which may be a chat template."""
MAX_DIGITS = 4000
"""Digits of an integer, for parsing takes their square."""

NOT_JSON = "peftstate.not_json"
"""Metadata of an attrs field that lives beside the JSON, as a tensor's bytes do."""

_Hook: TypeAlias = Callable[[Any, Any], Any]
_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a float",
    bool: "a boolean",
    dict: "an object",
    list: "an array",
    type(None): "null",
}
_SHOWN = 80
"""Characters of a text that a message shows."""


class DecodeError(ValueError):
    """A JSON value does not fit.

    Attributes:
        field: The path to the value, such as ``"rng.torch_cuda[1]"``.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


def _typed(kind: type, structure: _Hook = lambda value, _: value) -> _Hook:
    """A hook that takes a value of exactly one JSON type, and then structures it."""

    def check(value: Any, cls: Any) -> Any:
        if type(value) is not kind:
            found = _NAMES.get(type(value), type(value).__name__)
            raise DecodeError(f"expected {_NAMES[kind]}, found {found}")
        return structure(value, cls)

    return check


def _left_out(cls: Any) -> dict[str, AttributeOverride]:
    """The fields of an attrs class that are no part of its JSON, by their metadata."""
    fields = attrs.fields(get_origin(cls) or cls)
    return {field.name: override(omit=True) for field in fields if field.metadata.get(NOT_JSON)}


def _structure_record(cls: Any, converter: cattrs.Converter) -> _Hook:
    """The hook that makes an attrs class."""
    structure = make_dict_structure_fn(
        cls,
        converter,
        _cattrs_forbid_extra_keys=True,
        **_left_out(cls),  # type: ignore[arg-type]
    )

    def structure_or_say_where(value: Any, _: Any) -> Any:
        try:
            return structure(value, cls)
        except BaseValidationError as error:
            raise _first(error) from None

    return _typed(dict, structure_or_say_where)


def _first(errors: BaseValidationError) -> DecodeError:
    """The first of the errors that cattrs found in the fields of a record."""
    error = errors.exceptions[0]
    if isinstance(error, ForbiddenExtraKeysError):
        return DecodeError(f"unknown key {_short(min(error.extra_fields))}")
    notes = getattr(error, "__notes__", ())
    name = next((note.name for note in notes if isinstance(note, AttributeValidationNote)), "")
    message = "is missing" if isinstance(error, KeyError) else str(error)
    return DecodeError(message, field=join(step(name), getattr(error, "field", "")))


def _unstructure_record(cls: Any, converter: cattrs.Converter) -> Callable[[Any], Json]:
    """The hook that takes an attrs class apart."""
    return make_dict_unstructure_fn(cls, converter, **_left_out(cls))  # type: ignore[arg-type]


def _each(items: Iterable[tuple[Any, Any]], structure: _Hook, cls: Any) -> list[Any]:
    """The values of keys or indices, structured until one does not fit.

    cattrs would go on, and keep an error with its traceback for each of millions.
    """
    values = []
    place: Any = ""
    try:
        for place, item in items:  # noqa: B007 - it is what failed
            values.append(structure(item, cls))
    except DecodeError as error:
        raise DecodeError(str(error), field=join(step(place), error.field)) from None
    return values


def _structure_mapping(cls: Any, converter: cattrs.Converter) -> _Hook:
    """The hook of a ``Mapping[str, T]``."""
    inner = get_args(cls)[1]
    structure = converter.get_structure_hook(inner)
    return _typed(
        dict, lambda value, _: dict(zip(value, _each(value.items(), structure, inner), strict=True))
    )


def _is_tuple(cls: Any) -> bool:
    """Whether a type is ``tuple[T, ...]``."""
    return get_origin(cls) is tuple


def _structure_tuple(cls: Any, converter: cattrs.Converter) -> _Hook:
    """The hook of ``tuple[T, ...]``."""
    inner = get_args(cls)[0]
    structure = converter.get_structure_hook(inner)
    return _typed(list, lambda value, _: tuple(_each(enumerate(value), structure, inner)))


def _make_converter() -> cattrs.Converter:
    """The one converter of the package."""
    converter = cattrs.Converter(unstruct_collection_overrides={tuple: list})
    for kind in (str, int, float, bool):
        converter.register_structure_hook(kind, _typed(kind))
    converter.register_structure_hook_factory(attrs.has)(_structure_record)
    converter.register_unstructure_hook_factory(attrs.has)(_unstructure_record)
    converter.register_structure_hook_factory(is_mapping)(_structure_mapping)
    converter.register_structure_hook_factory(_is_tuple)(_structure_tuple)
    return converter


_CONVERTER = _make_converter()


def encode(record: attrs.AttrsInstance) -> dict[str, Json]:
    """A record as a JSON value."""
    value: dict[str, Json] = _CONVERTER.unstructure(record)
    return value


def decode(value: Json, record: type[R]) -> R:
    """A JSON value as a record.

    Raises:
        DecodeError: A type is wrong, a key is unknown or missing; `field` is the path to it.
    """
    return _CONVERTER.structure(value, record)


def alike(first: Any, second: Any) -> bool:
    """Whether two records, or values in them, give the same JSON, as far as it is told without it.

    Of a tuple and a list it is not.
    """
    kind = type(first)
    if kind in SCALARS:
        return type(second) is kind and bool(first == second)
    if kind is tuple or kind is list:
        return type(second) is kind and len(first) == len(second) and all(map(alike, first, second))
    if attrs.has(kind):
        values = _values_of(kind)
        return type(second) is kind and alike(values(first), values(second))
    return (
        isinstance(first, Mapping)
        and isinstance(second, Mapping)
        and first.keys() == second.keys()
        and all(alike(value, second[key]) for key, value in first.items())
    )


@cache
def _values_of(cls: type[attrs.AttrsInstance]) -> Callable[[Any], Any]:
    """What gives the values of an attrs class that are part of its JSON: a tuple, or the one."""
    left_out = _left_out(cls)
    return attrgetter(*(field.name for field in attrs.fields(cls) if field.name not in left_out))


def loads(data: bytes) -> Json:
    """Parse JSON that somebody else may have written.

    Args:
        data: UTF-8 text, whose size the caller has limited.

    Raises:
        DecodeError: Not UTF-8 or not JSON; a key twice in an object; NaN or infinity; lone
            surrogates; more than one of the limits of this module allows.
    """
    # each value but the first stands behind one of these; those in strings count, too
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise DecodeError(f"more than {MAX_VALUES} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
        )
    except DecodeError:
        raise
    except RecursionError:
        raise DecodeError(f"more than {MAX_DEPTH} levels of nesting") from None
    except ValueError as error:
        raise DecodeError(f"not UTF-8 JSON: {error}") from None
    _check_values(value)
    return value


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """An object of JSON, in which no key may stand twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DecodeError(f"key {_short(key)} stands twice")
            seen.add(key)
    return value


def _integer(digits: str) -> int:
    """An integer, whatever limit of Python's own was lifted in this process."""
    if len(digits) > MAX_DIGITS:
        raise DecodeError(f"an integer of more than {MAX_DIGITS} digits")
    return int(digits)


def _constant(name: str) -> Json:
    """What Python's parser takes beyond JSON: NaN and the infinities."""
    raise DecodeError(f"{name} is not JSON")


def _check_values(value: Json) -> None:
    """Refuse what parses but cannot be written again: depth, infinite floats, lone surrogates."""
    level: list[Json] = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Json] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    _check_text(key, MAX_KEY)
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
            elif isinstance(item, str):
                _check_text(item, MAX_TEXT)
            elif isinstance(item, float) and item in (float("inf"), float("-inf")):
                raise DecodeError("a number is too large")
        level = deeper
    if level:
        raise DecodeError(f"more than {MAX_DEPTH} levels of nesting")


def _check_text(text: str, longest: int) -> None:
    """Refuse text that is too long, or no Unicode."""
    if len(text) > longest:
        raise DecodeError(f"{_short(text)} is longer than {longest} characters")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DecodeError(f"{_short(text)} holds a lone surrogate") from None


def _short(text: str) -> str:
    """The beginning of a text, in quotes, for a message."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def dumps(value: Json) -> bytes:
    """JSON for a person to read and to compare: sorted keys, a key a line."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def canonical(value: Mapping[str, Json]) -> bytes:
    """JSON in one form only, to digest: sorted keys, no space."""
    return json.dumps(
        value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False
    ).encode("utf-8")
