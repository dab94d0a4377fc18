"""Hypothesis strategies for the records of manifests, made from their annotations."""

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
    origin = get_origin(record) or record
    arguments = dict(zip(getattr(origin, "__parameters__", ()), get_args(record), strict=True))
    hints = get_type_hints(origin)
    fields = {
        field.name: _values(hints[field.name], arguments)
        for field in attrs.fields(origin)
        if not field.metadata.get(NOT_JSON)
    }
    return st.builds(origin, **fields)


def _values(annotation: Any, arguments: Mapping[Any, Any]) -> st.SearchStrategy[Any]:
    """Values of a field, the parameters of its class filled in."""
    if isinstance(annotation, TypeVar):
        annotation = arguments[annotation]
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        return st.one_of([_values(item, arguments) for item in inner])
    if origin is tuple:
        return st.lists(_values(inner[0], arguments), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(NAMES, _values(inner[1], arguments), max_size=3)
    return records(annotation)
