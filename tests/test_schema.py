"""The JSON Schema of manifests: that it is up to date, and says what peftstate takes."""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
import runpy
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftstate._codec import NOT_JSON, DecodeError, dumps, loads
from peftstate._digest import tensor_digest
from peftstate._schema import FILE, manifest_schema
from peftstate.manifest import SCHEMA_VERSION, Manifest
from peftstate.sections import SECTIONS
from tests._records import example, records

SCHEMA = json.loads((importlib.resources.files("peftstate") / "manifest.schema.json").read_bytes())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
DOCS = Path(__file__).parents[1] / "docs"
GOLDEN = Path(__file__).parent / "golden" / f"schema-{SCHEMA_VERSION}"
MANIFESTS = sorted(GOLDEN.glob("**/peftstate.json"))


def test_up_to_date() -> None:
    """The file is what the records give; if not, run ``python -m peftstate._schema``."""
    assert FILE.read_bytes() == dumps(manifest_schema())


def test_valid() -> None:
    """It is a schema of draft 2020-12."""
    assert SCHEMA["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON value, the value itself first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)


def test_descriptions() -> None:
    """Every field of every record is described, and nothing else than JSON is spoken of."""
    for definition in SCHEMA["$defs"].values():
        assert definition["description"]
        assert definition["properties"]
        for field in definition["properties"].values():
            assert field["description"]
            assert "``" not in field["description"]
            assert "None" not in field["description"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.parent.name)
def test_golden(path: Path) -> None:
    """The manifests of the golden folders are valid; with another key anywhere they are not."""
    manifest = json.loads(path.read_bytes())
    sections = manifest["sections"]
    VALIDATOR.validate(manifest)
    for value in (manifest, sections, *sections.values(), *manifest["files"].values()):
        value["another key"] = {}
        assert not VALIDATOR.is_valid(manifest)
        del value["another key"]
    sections["base_model"]["config"]["another key"] = {}  # a config has what transformers gives it
    VALIDATOR.validate(manifest)


def test_fresh(tmp_path: Path, load_base: Any, with_lora: Any) -> None:
    """What is saved now is valid, quantized or not."""
    for kind in ("bf16", "nf4"):
        with_lora(load_base(kind)).save_pretrained(tmp_path / kind)
        VALIDATOR.validate(json.loads((tmp_path / kind / "peftstate.json").read_bytes()))


@pytest.mark.parametrize(
    "key", ["schema_version", "peftstate_version", "sections", "files", "digest"]
)
@pytest.mark.parametrize("value", [None, True, 0, 1, 1.5, "1", []])
def test_envelope(key: str, value: Any) -> None:
    """What stands around the sections has its types, too, and must be there."""
    assert SCHEMA["required"] == [
        "schema_version",
        "peftstate_version",
        "sections",
        "files",
        "digest",
    ]
    sections = {section.name: example(section.record) for section in SECTIONS}
    manifest = json.loads(Manifest(sections=sections, files={}).to_json())
    manifest[key] = value
    assert VALIDATOR.is_valid(manifest) == ((key, value) == ("peftstate_version", "1"))
    del manifest[key]
    assert not VALIDATOR.is_valid(manifest)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value but the outermost."""
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, item in children:
        yield (*path, key)
        yield from _paths(item, (*path, key))


OTHERS: list[Any] = [None, True, "text", [], {}, [None], {"a": {}}]
"""Values of each type but numbers."""


def _takes(section: Any, value: Any) -> bool:
    """Whether a section decodes a value."""
    try:
        section.decode(value)
    except DecodeError:
        return False
    return True


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_same_as_codec(section: Any, data: st.DataObject) -> None:
    """The schema takes each record of each section, and of what is near one what the codec takes.

    Numbers are left out, of which JSON Schema does not tell 1.0 from 1.
    """
    reference = SCHEMA["properties"]["sections"]["properties"][section.name]
    validator = VALIDATOR.evolve(schema={**reference, "$defs": SCHEMA["$defs"]})
    value = loads(dumps(section.encode(data.draw(records(section.record)))))
    assert validator.is_valid(value)
    path = data.draw(st.sampled_from(list(_paths(value))))
    changed = copy.deepcopy(value)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "remove":
        del parent[path[-1]]
    elif action == "add" and isinstance(parent, dict):
        parent["another key"] = None
    else:
        parent[path[-1]] = data.draw(
            st.sampled_from([None, True, "text", [], {}, [None], {"a": {}}])
        )
    assert validator.is_valid(changed) == _takes(section, changed)


def test_page() -> None:
    """The tables of the format's page are what the records give, as its vector is what is computed.

    If not, run ``python docs/fields.py``.
    """
    page = (DOCS / "manifest.md").read_text("utf-8")
    assert runpy.run_path(str(DOCS / "fields.py"))["with_fields"](page) == page
    vector = tensor_digest("float32", (2, 3), struct.pack("<6f", *range(6)))
    assert f"`[[0, 1, 2], [3, 4, 5]]` has the digest `{vector}`" in page
    for name in SCHEMA["$defs"].keys() - {section.record.__name__ for section in SECTIONS}:
        assert f"\n### {name}\n" in page
    for target in re.findall(r"\]\(#([^)]*)\)", page):
        headings = re.findall(r"^#+ `?(.*?)`?$", page, re.MULTILINE)
        assert target in {heading.lower().replace(" ", "-") for heading in headings}


def test_every_record_class() -> None:
    """Each class of the records is defined once, whatever beside the JSON lies left out."""

    def fields(cls: Any) -> set[str]:
        return {field.name for field in attrs.fields(cls) if not field.metadata.get(NOT_JSON)}

    for section in SECTIONS:
        definition = SCHEMA["$defs"][section.record.__name__]
        assert definition["properties"].keys() == fields(section.record)
