"""Write the tables of fields in `manifest.md`, from the same record classes as the JSON Schema.

Run ``python docs/fields.py`` after a record changed; a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftstate._schema import manifest_schema

PAGE = Path(__file__).with_name("manifest.md")
BEGIN, END = "<!-- begin fields -->\n", "<!-- end fields -->\n"

_TYPES = {"number": "float"}


def with_fields(page: str) -> str:
    """The page with its tables written anew."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "".join([head, BEGIN, *(f"{line}\n" for line in _lines()), "\n", END, tail])


def _lines() -> Iterator[str]:
    """The lines of all tables: those of the sections, then of the classes in them."""
    schema = manifest_schema()
    classes = schema["$defs"]
    sections = schema["properties"]["sections"]
    for name, section in sections["properties"].items():
        record = classes.pop(section["$ref"].rpartition("/")[2])
        absent = "" if name in sections["required"] else " It may be absent."
        yield from _table(f"`{name}`", record, absent)
    for name, record in sorted(classes.items()):
        yield from _table(name, record, "")


def _table(title: str, record: Mapping[str, Any], remark: str) -> Iterator[str]:
    """A class as a heading and a table."""
    yield from ("", f"### {title}", "", record["description"] + remark, "")
    yield from ("| Field | Type | Meaning |", "| --- | --- | --- |")
    for name, field in record["properties"].items():
        description = field["description"].replace("|", "\\|")
        yield f"| `{name}` | {_type(field)} | {description} |"


def _type(schema: Mapping[str, Any]) -> str:
    """A type in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{value!r}`" for value in schema["enum"])
    kind: str = schema.get("type", "any value")
    inner = schema.get("items", schema.get("additionalProperties"))
    if isinstance(inner, Mapping):
        several = f"({_type(inner)})" if "anyOf" in inner else _plural(_type(inner))
        return f"{kind} of {several}"
    return _TYPES.get(kind, kind)


def _plural(kind: str) -> str:
    """More than one of a type: ``"strings"``, but ``"objects of strings"``."""
    return re.sub(r"^(any value|string|integer|float|boolean|object|array)\b", r"\1s", kind)


if __name__ == "__main__":
    PAGE.write_text(with_fields(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
