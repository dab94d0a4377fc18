"""Records to JSON values and back: strict, with the path of what is wrong.

cattrs does the walking. Its default converter coerces (``"1"`` for an `int`); this one takes a
value only in the type that the record names, and refuses keys that the record does not know.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.cols import is_mapping, list_structure_factory, mapping_structure_factory
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)
from cattrs.gen import (
    AttributeOverride,
    make_dict_structure_fn,
    make_dict_unstructure_fn,
    override,
)

from peftstate._diff import Json, join, step

R = TypeVar("R", bound=attrs.AttrsInstance)

MAX_DEPTH = 24
"""Levels of nesting that a manifest may have."""

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


class DecodeError(ValueError):
    """A JSON value does not fit.

    Attributes:
        field: The path to the value, such as ``"rng.torch_cuda[1]"``.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


def _checked(kind: type, structure: _Hook = lambda value, _: value) -> _Hook:
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
    return _checked(dict, structure)


def _unstructure_record(cls: Any, converter: cattrs.Converter) -> Callable[[Any], Json]:
    """The hook that takes an attrs class apart."""
    return make_dict_unstructure_fn(cls, converter, **_left_out(cls))  # type: ignore[arg-type]


def _structure_mapping(cls: Any, converter: cattrs.Converter) -> _Hook:
    """The hook of a `Mapping`."""
    plain: Any = types.GenericAlias(dict, get_args(cls))
    return _checked(dict, mapping_structure_factory(plain, converter))


def _is_tuple(cls: Any) -> bool:
    """Whether a type is ``tuple[T, ...]``."""
    return get_origin(cls) is tuple


def _structure_tuple(cls: Any, converter: cattrs.Converter) -> _Hook:
    """The hook of ``tuple[T, ...]``."""
    plain: Any = types.GenericAlias(list, get_args(cls)[:1])
    structure = list_structure_factory(plain, converter)
    return _checked(list, lambda value, _: tuple(structure(value, _)))


def _make_converter() -> cattrs.Converter:
    """The one converter of the package."""
    converter = cattrs.Converter(unstruct_collection_overrides={tuple: list})
    for kind in (str, int, float, bool):
        converter.register_structure_hook(kind, _checked(kind))
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
    try:
        return _CONVERTER.structure(value, record)
    except BaseValidationError as error:
        path, cause = next(_leaves(error))
        raise DecodeError(_reason(cause), field=path) from None


def _leaves(error: BaseException, path: str = "") -> Iterator[tuple[str, BaseException]]:
    """The single errors in a group of cattrs', each with its path."""
    if not isinstance(error, BaseExceptionGroup):
        yield path, error
        return
    for inner in error.exceptions:
        yield from _leaves(inner, join(path, _step_of(inner)))


def _step_of(error: BaseException) -> str:
    """The step of a path that cattrs noted on an error."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return step(note.name)
        if isinstance(note, IterableValidationNote):
            return f"[{note.index}]" if isinstance(note.index, int) else step(str(note.index))
    return ""


def _reason(error: BaseException) -> str:
    """What to tell of a single error."""
    if isinstance(error, ForbiddenExtraKeysError):
        return f"unknown key {min(error.extra_fields)!r}"
    if isinstance(error, KeyError):
        return "is missing"
    return str(error)


def loads(data: bytes) -> Json:
    """Parse JSON that somebody else may have written.

    Args:
        data: UTF-8 text, whose size the caller has limited.

    Raises:
        DecodeError: Not UTF-8 or not JSON; a key twice in an object; NaN or infinity; a number of
            thousands of digits; lone surrogates; more than `MAX_DEPTH` levels.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
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
        keys = [key for key, _ in pairs]
        raise DecodeError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return value


def _constant(name: str) -> Json:
    """What Python's parser takes beyond JSON: NaN and the infinities."""
    raise DecodeError(f"{name} is not JSON")


def _check_values(value: Json) -> None:
    """Refuse what parses but cannot be written again: depth, infinite floats, lone surrogates."""
    todo: list[tuple[Json, int]] = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise DecodeError(f"more than {MAX_DEPTH} levels of nesting")
        if isinstance(item, dict):
            todo += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, list):
            todo += [(inner, depth + 1) for inner in item]
        elif isinstance(item, str):
            _check_text(item)
        elif isinstance(item, float) and item in (float("inf"), float("-inf")):
            raise DecodeError("a number is too large")


def _check_text(text: str) -> None:
    """Refuse text that is no Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DecodeError(f"{text!r} holds a lone surrogate") from None


def dumps(value: Json) -> bytes:
    """JSON for a person to read and to compare: sorted keys, a key a line."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def canonical(value: Mapping[str, Json]) -> bytes:
    """JSON in one form only, to digest: sorted keys, no space."""
    return json.dumps(
        value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False
    ).encode("utf-8")
