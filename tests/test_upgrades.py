"""How manifests of older schemas are brought up to date."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from peftstate._codec import DecodeError
from peftstate._upgrades import UPGRADES
from peftstate.manifest import Manifest
from peftstate.sections import SECTIONS
from tests._records import example

NEW_IN_2: dict[str, dict[str, Any]] = {
    "sections.adapters": {"safe_merge": False},
    "sections.base_model": {"files": {}, "remote_code": None},
    "sections.extra_tensors": {"quantized": {}},
    "sections.rng": {"process": None},
    "sections.rng.numpy": {"generator": "MT19937"},
    "sections.tokenizer": {"files": None},
    "sections.training": {"inference_mode": {}},
}
"""The fields of schema 2, by the object that they are in, with what an older manifest means."""


def _content() -> dict[str, Any]:
    """What the seal of a manifest covers, in the current schema."""
    sections = {section.name: example(section.record) for section in SECTIONS}
    content: dict[str, Any] = json.loads(Manifest(sections=sections, files={}).to_json())
    del content["digest"]
    return content


UNKNOWN_DROPOUT: dict[str, Any] = {"default": None, "exceptions": {}}
"""The field of schema 3, `dropout` of each part of a model, with what an older manifest means."""


def _at(content: Any, path: str) -> Any:
    """The object at a path."""
    for name in path.split("."):
        content = content[name]
    return content


def _parts(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What is recorded of the training of each part of a model."""
    training = content["sections"]["training"]
    return [training["base"], training["model"], *training["adapters"].values()]


def _of_schema_2() -> dict[str, Any]:
    """The same in schema 2."""
    content = _content()
    for part in _parts(content):
        del part["dropout"]
    return content


def _of_schema_1() -> dict[str, Any]:
    """The same in schema 1."""
    content = _of_schema_2()
    for path, fields in NEW_IN_2.items():
        for field in fields:
            del _at(content, path)[field]
    return content


def test_from_1_to_2() -> None:
    """Each new field gets what was true of every older manifest, and nothing else changes."""
    expected = _of_schema_2()
    for path, fields in NEW_IN_2.items():
        _at(expected, path).update(fields)
    assert UPGRADES[1](_of_schema_1()) == expected


def test_from_2_to_3() -> None:
    """What no older manifest has is not known, of each adapter, too."""
    expected = _content()
    for part in _parts(expected):
        part["dropout"] = UNKNOWN_DROPOUT
    assert UPGRADES[2](_of_schema_2()) == expected


def test_dropout_in_a_manifest_of_schema_2() -> None:
    """That schema does not know it, of adapters neither."""
    content = _of_schema_2()
    (name, part), *_ = content["sections"]["training"]["adapters"].items()
    part["dropout"] = UNKNOWN_DROPOUT
    with pytest.raises(DecodeError) as caught:
        UPGRADES[2](content)
    assert caught.value.field == f"sections.training.adapters.{name}"
    assert str(caught.value) == "unknown key 'dropout'"


def test_sections_that_are_absent_stay_so() -> None:
    """A manifest without a tokenizer gets none."""
    content = _of_schema_1()
    del content["sections"]["tokenizer"]
    assert "tokenizer" not in UPGRADES[1](content)["sections"]


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, fields in NEW_IN_2.items() for field in fields]
)
def test_fields_of_a_newer_schema_are_refused(path: str, field: str) -> None:
    """An older schema does not know them, whatever they say."""
    content = _of_schema_1()
    _at(content, path)[field] = NEW_IN_2[path][field]
    with pytest.raises(DecodeError) as caught:
        UPGRADES[1](content)
    assert (caught.value.field, str(caught.value)) == (path, f"unknown key {field!r}")


@pytest.mark.parametrize("path", ["sections", "sections.base_model", "sections.rng.numpy"])
@pytest.mark.parametrize("value", [None, 1, [], "text", {}])
def test_what_is_no_manifest_is_left_for_the_decoder(path: str, value: Any) -> None:
    """A step changes nothing where there is no object, and raises nothing of its own."""
    content = _of_schema_1()
    above, _, key = path.rpartition(".")
    (_at(content, above) if above else content)[key] = value
    before = copy.deepcopy(content)
    after = UPGRADES[1](content)
    if not isinstance(value, dict):
        (_at(before, above) if above else before)[key] = value
        assert (_at(after, above) if above else after)[key] == value
