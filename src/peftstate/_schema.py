"""The JSON Schema of manifests, made of the record classes.

``python -m peftstate._schema`` writes it to `FILE`, which the package contains; a test compares
the two. Validators call 1.0 an integer and 1 a number, as JSON Schema does; peftstate does not.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

from peftstate._codec import NOT_JSON, dumps
from peftstate._diff import Json
from peftstate.manifest import SCHEMA_VERSION, FileRecord
from peftstate.sections import SECTIONS

FILE = Path(__file__).with_name("manifest.schema.json")

_Schema: TypeAlias = dict[str, Json]
_TYPES: dict[Any, _Schema] = {
    Any: {},
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
}
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n     .*)*)", re.MULTILINE)
"""One entry under ``Attributes:`` in a docstring, with the deeper lines that go on with it."""


def manifest_schema() -> _Schema:
    """The schema of a manifest that this version writes."""
    definitions: dict[str, _Schema] = {}
    sections = {section.name: _of(section.record, definitions) for section in SECTIONS}
    optional = frozenset(section.name for section in SECTIONS if section.is_optional)
    files = {"type": "object", "additionalProperties": _of(FileRecord, definitions)}
    properties: dict[str, _Schema] = {
        "schema_version": {"const": SCHEMA_VERSION},
        "peftstate_version": {"type": "string"},
        "sections": _object(sections, optional),
        "files": files,
        "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"peftstate manifest, schema version {SCHEMA_VERSION}",
        **_object(properties),
        "$defs": definitions,
    }


def _object(properties: Mapping[str, _Schema], optional: frozenset[str] = frozenset()) -> _Schema:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _of(annotation: Any, definitions: dict[str, _Schema]) -> _Schema:
    """The schema of a type; those of classes go to the definitions and are referred to."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _TYPES:
        return _TYPES[annotation]
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(item, definitions) for item in arguments]}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    name = "Of".join([_name(origin or annotation), *map(_name, arguments)])
    if name not in definitions:
        definitions[name] = _of_record(origin or annotation, arguments, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _name(cls: type) -> str:
    """The name of a class in the definitions."""
    return cls.__name__[0].upper() + cls.__name__[1:]


def _of_record(cls: Any, arguments: tuple[Any, ...], definitions: dict[str, _Schema]) -> _Schema:
    """The schema of an attrs class."""
    hints = get_type_hints(cls)
    parameters = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=True))
    summary, descriptions = _described(cls)
    properties: dict[str, _Schema] = {}
    optional = set()
    for field in attrs.fields(cls):
        if field.metadata.get(NOT_JSON):
            continue
        annotation = _filled(hints[field.name], parameters)
        description = {"description": descriptions[field.name]}
        properties[field.name] = {**description, **_of(annotation, definitions)}
        if field.default is not attrs.NOTHING:
            optional.add(field.name)
    return {"description": summary, **_object(properties, frozenset(optional))}


def _filled(annotation: Any, parameters: Mapping[TypeVar, Any]) -> Any:
    """An annotation with its type variables filled in."""
    if isinstance(annotation, TypeVar):
        return parameters[annotation]
    variables = getattr(annotation, "__parameters__", ())
    return (
        annotation[tuple(parameters[variable] for variable in variables)]
        if variables
        else annotation
    )


def _described(cls: type) -> tuple[str, dict[str, str]]:
    """What the docstring of a class says of it in its first line, and of each attribute."""
    summary, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    found = {name: _plain(text) for name, text in _ATTRIBUTE.findall(attributes)}
    return _plain(summary), found


def _plain(text: str) -> str:
    """Text of a docstring in one line, in the words of JSON."""
    return " ".join(text.replace("``", "`").replace("`None`", "`null`").split())


if __name__ == "__main__":
    FILE.write_bytes(dumps(manifest_schema()))
