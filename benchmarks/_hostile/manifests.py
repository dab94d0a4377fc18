"""Manifests: their bytes, their JSON, their schema, their seal, their structure."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._hostile.case import MANIFEST, Case, edited, manifest_of, raw, section, text
from peftstate._codec import MAX_KEY, MAX_TEXT, MAX_VALUES
from peftstate.errors import IntegrityError, ManifestDecodeError, SchemaVersionError

DEEP = 100_000


def _sparse(size: int) -> Callable[[Path], None]:
    """A manifest that has a size and takes no space."""

    def make(folder: Path) -> None:
        os.truncate(folder / MANIFEST, size)

    return make


def _encoded(encoding: str) -> Callable[[Path], None]:
    """The manifest in another encoding."""

    def make(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_bytes(path.read_text("utf-8").encode(encoding))

    return make


def _filled(value: bytes) -> Callable[[], bytes]:
    """As much of a value as a manifest has room for."""
    return lambda: b"[" + value * (60_000_000 // len(value)) + b"0]"


def _nested(levels: int) -> Any:
    """An object in an object, and so on."""
    value: Any = 0
    for _ in range(levels):
        value = {"a": value}
    return value


def _many_keys() -> bytes:
    """An object of very many keys of which the last stands twice."""
    keys = ",".join(f'"{number}":0' for number in range(300_000))
    return f'{{{keys},"299999":0}}'.encode()


def _insert(what: str) -> Callable[[str], str]:
    """Text that is put at the beginning of the manifest's object."""
    return lambda manifest: manifest.replace("{", "{" + what, 1)


_BYTES = (
    ("empty", "a parser that expects something", raw(b""), "not UTF-8 JSON"),
    ("nul", "a parser in C", raw(b"\0" * 100), "not UTF-8 JSON"),
    ("utf-16", "a parser that guesses encodings", _encoded("utf-16"), "not UTF-8 JSON"),
    ("utf-32", "a parser that guesses encodings", _encoded("utf-32-le"), "not UTF-8 JSON"),
    ("bom", "two readers, of which one skips it", _encoded("utf-8-sig"), "BOM"),
    ("overlong", "a decoder that takes '/' in two bytes", raw(b'{"a": "\xc0\xaf"}'), "not UTF-8"),
    ("no object", "a reader that asks for keys", raw(b'["schema_version", 1]'), "not an object"),
    ("two values", "two readers, of which one stops", text(lambda t: t + "{}"), "Extra data"),
    ("comment", "two readers, of which one allows it", text(lambda t: "// a\n" + t), "not UTF-8"),
    ("cut", "a reader of half a file", text(lambda t: t[: len(t) // 2]), "not UTF-8 JSON"),
    ("deep lists", "the stack", raw(b"[" * DEEP), "24 levels"),
    ("deep objects", "the stack", raw(b'{"a":' * DEEP), "24 levels"),
    ("60 MB of brackets", "the stack, for long", raw(lambda: b"[" * 60_000_000), "values"),
    ("60 MB of lists", "memory: 1.3 GB", raw(_filled(b"[],")), f"more than {MAX_VALUES} values"),
    ("60 MB of objects", "memory: 1.5 GB", raw(_filled(b"{},")), f"more than {MAX_VALUES} values"),
    ("60 MB of numbers", "memory: 1 GB", raw(_filled(b"1e9,")), f"more than {MAX_VALUES} values"),
    ("a million digits", "time: the square", raw(b"9" * 1_000_000), "more than 4000 digits"),
    ("twice in 300,000 keys", "time: the square", raw(_many_keys), "'299999' stands twice"),
    ("twice", "two readers, first and last", text(_insert('"digest":"",')), "stands twice"),
    ("twice by escape", "a look for equal bytes", text(_insert('"\\u0064igest":1,')), "'digest'"),
    ("NaN", "a comparison that is never true", text(_insert('"a":NaN,')), "NaN is not JSON"),
    ("Infinity", "arithmetic", text(_insert('"a":-Infinity,')), "-Infinity is not JSON"),
    ("1e999", "arithmetic", text(_insert('"a":1e999,')), "a number is too large"),
    ("surrogate", "what writes it again", text(_insert('"a":"\\ud800",')), "lone surrogate"),
    ("surrogate key", "what writes it again", text(_insert('"\\udfff":0,')), "lone surrogate"),
    ("raw surrogate", "a decoder", text(_insert('"a":"\ud800",')), "not UTF-8 JSON"),
    ("long key", "messages", text(_insert(f'"{"k" * (MAX_KEY + 1)}":0,')), "is longer than"),
    ("long text", "patterns", text(_insert(f'"a":"{"s" * (MAX_TEXT + 1)}",')), "is longer than"),
)


def _version(value: Any) -> Callable[[Path], object]:
    """A manifest of a schema."""
    return edited(lambda manifest: manifest.update(schema_version=value))


_SCHEMAS = (
    (
        "schema true",
        _version(value=True),
        ManifestDecodeError,
        "schema_version: expected an integer",
    ),
    ("schema text", _version("2"), ManifestDecodeError, "schema_version: expected an integer"),
    ("schema 1.0", _version(1.0), ManifestDecodeError, "schema_version: expected an integer"),
    ("schema null", _version(None), ManifestDecodeError, "schema_version: expected an integer"),
    ("schema 0", _version(0), SchemaVersionError, "schema version 0"),
    ("schema -1", _version(-1), SchemaVersionError, "schema version -1"),
    ("schema 99", _version(99), SchemaVersionError, "schema version 99"),
    ("schema 10**30", _version(10**30), SchemaVersionError, "schema version 1000000000"),
    ("schema 1 with more", _version(1), ManifestDecodeError, "unknown key"),
)


def _digest(value: Any) -> Callable[[Path], object]:
    """A manifest with another seal."""
    return edited(lambda manifest: manifest.update(digest=value), seal=False)


def _upper(folder: Path) -> None:
    """A manifest whose seal is in upper case."""
    upper = manifest_of(folder)["digest"].upper()
    _digest(upper)(folder)


_SEALS = (
    ("no seal", edited(lambda value: value.pop("digest"), seal=False), "digest: is missing"),
    ("seal null", _digest(None), "digest None"),
    ("seal of another", _digest("0" * 64), "digest 000000"),
    ("seal in upper case", _upper, "digest"),
    ("seal a list", _digest([]), "digest []"),
)


def _many_wrong(value: dict[str, Any]) -> None:
    """Very many tensors, none of which is one."""
    value["sections"]["base_model"]["tensors"] = {str(number): {} for number in range(100_000)}


_ADAPTER = "sections.adapters.adapters.default"
_STRUCTURE = (
    ("unknown key", edited(lambda value: value.update(hook="os.system")), "hook: unknown key"),
    (
        "unknown section",
        edited(lambda value: value["sections"].update(code={"run": "import os"})),
        "sections.code: unknown section",
    ),
    (
        "missing section",
        edited(lambda value: value["sections"].pop("rng")),
        "sections.rng: is missing",
    ),
    (
        "section null",
        edited(lambda value: value["sections"].update(dtype=None)),
        "sections.dtype: expected an object",
    ),
    (
        "dunder in a record",
        section("training", lambda record: record.update(__class__="os.system")),
        "sections.training: unknown key '__class__'",
    ),
    (
        "data in a record",
        section("rng", lambda record: record["torch_cpu"].update(data=[1])),
        "sections.rng.torch_cpu: unknown key 'data'",
    ),
    (
        "true for an integer",
        edited(lambda value: value["files"]["peftstate.tensors"].update(size=True)),
        "files[peftstate.tensors].size: expected an integer",
    ),
    (
        "integer for a float",
        section("adapters", lambda r: r["adapters"]["default"]["scaling"].update(default=1)),
        f"{_ADAPTER}.scaling.default: expected a float",
    ),
    (
        "float for an integer",
        section("rng", lambda record: record["numpy"].update(position=1.0)),
        "sections.rng.numpy.position: expected an integer",
    ),
    (
        "text for a boolean",
        section("adapters", lambda record: record.update(enabled="false")),
        "sections.adapters.enabled: expected a boolean",
    ),
    (
        "list for an object",
        section("generation", lambda record: record.update(config=[])),
        "sections.generation.config: expected an object",
    ),
    (
        "null for a text",
        section("base_model", lambda record: record.update(model_class=None)),
        "sections.base_model.model_class: expected a string",
    ),
    (
        "terminal codes in a key",
        section("dtype", lambda r: r["adapters"].update({"\x1b[2J\nok": 1})),
        r"sections.dtype.adapters[\x1b[2J\nok]: expected an object",
    ),
    (
        "100,000 wrong records",
        edited(_many_wrong),
        "sections.base_model.tensors[0].dtype: is missing",
    ),
    (
        "25 levels in a config",
        section("generation", lambda record: record["config"].update(cache_config=_nested(25))),
        "24 levels",
    ),
)

CASES = (
    *(
        Case(name=name, attacks=attacks, make=make, error=ManifestDecodeError, tells=tells)
        for name, attacks, make, tells in _BYTES
    ),
    *(
        Case(
            name=f"a manifest of {size} bytes",
            attacks="memory",
            make=_sparse(size),
            error=IntegrityError,
            tells=f"found {size} bytes",
        )
        for size in (64 * 1024 * 1024 + 1, 2**40)
    ),
    *(
        Case(name=name, attacks="the rules of another schema", make=make, error=error, tells=tells)
        for name, make, error, tells in _SCHEMAS
    ),
    *(
        Case(
            name=name,
            attacks="a reader that does not look at the seal",
            make=make,
            error=ManifestDecodeError if name == "no seal" else IntegrityError,
            tells=tells,
        )
        for name, make, tells in _SEALS
    ),
    *(
        Case(
            name=name,
            attacks="code that trusts the types",
            make=make,
            error=ManifestDecodeError,
            tells=tells,
        )
        for name, make, tells in _STRUCTURE
    ),
)
