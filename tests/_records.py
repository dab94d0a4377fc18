"""Records of manifests, made from their annotations: any of a class, and one example."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
from hypothesis import strategies as st

from peftstate._codec import NOT_JSON

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | NUMBERS | NAMES
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
"""Any JSON value."""

_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    Any: VALUES,
    bool: st.booleans(),
    float: NUMBERS,
    int: st.integers(),
    str: NAMES,
    type(None): st.none(),
}


def records(record: Any) -> st.SearchStrategy[Any]:
    """Instances of a record class, which may be generic: ``records(Table[bool])``."""
    return st.builds(
        get_origin(record) or record,
        **{name: _values(annotation) for name, annotation in _fields(record).items()},
    )


def _values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        return st.one_of([_values(item) for item in inner])
    if origin is tuple:
        return st.lists(_values(inner[0]), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(NAMES, _values(inner[1]), max_size=3)
    return records(annotation)


_EXAMPLES = {Any: "any", bool: True, float: 0.5, int: 1, str: "text", type(None): None}


def example(annotation: Any) -> Any:
    """The one value of a type that has nothing empty in it; the key in each mapping is "a.b"."""
    if annotation in _EXAMPLES:
        return _EXAMPLES[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return inner[0]
    if origin in (Union, types.UnionType):
        return example(inner[0])
    if origin is tuple:
        return (example(inner[0]),)
    if origin is Mapping:
        return {"a.b": example(inner[1])}
    return (origin or annotation)(
        **{name: example(field) for name, field in _fields(annotation).items()}
    )


def _fields(record: Any) -> dict[str, Any]:
    """The annotations of a record class's fields in JSON, its type variables filled in."""
    cls = get_origin(record) or record
    arguments = dict(zip(getattr(cls, "__parameters__", ()), get_args(record), strict=True))
    hints = get_type_hints(cls)
    return {
        field.name: _filled(hints[field.name], arguments)
        for field in attrs.fields(cls)
        if not field.metadata.get(NOT_JSON)
    }


def _filled(annotation: Any, arguments: Mapping[Any, Any]) -> Any:
    """An annotation without type variables."""
    if isinstance(annotation, TypeVar):
        return arguments[annotation]
    variables = getattr(annotation, "__parameters__", ())
    return annotation[tuple(arguments[item] for item in variables)] if variables else annotation
