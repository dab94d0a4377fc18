"""The manifest: how it is written, and what is refused when it is read."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

import peftstate
from peftstate import manifest as module
from peftstate._codec import canonical, dumps
from peftstate._upgrades import UPGRADES
from peftstate.errors import IntegrityError, ManifestDecodeError, SchemaVersionError
from peftstate.manifest import SCHEMA_VERSION, FileRecord, Manifest
from peftstate.sections import SECTIONS
from tests._records import example, records

SHA = "0123456789abcdef" * 4
MANIFEST = Manifest(
    sections={section.name: example(section.record) for section in SECTIONS},
    files={"ref/adapter_model.safetensors": FileRecord(size=3, sha256=SHA)},
)
DATA = MANIFEST.to_json()
VALUE: dict[str, Any] = json.loads(DATA)


def read(data: bytes) -> Manifest:
    """Read a manifest."""
    return Manifest.from_json(data, path="a/peftstate.json")


def sealed(value: dict[str, Any]) -> bytes:
    """What somebody writes who edits a manifest and knows how to seal it."""
    content = {key: item for key, item in value.items() if key != "digest"}
    return dumps({**content, "digest": blake3(canonical(content)).hexdigest()})


def edited(edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """The manifest, edited and sealed again."""
    value = copy.deepcopy(VALUE)
    edit(value)
    return sealed(value)


def _manifests() -> st.SearchStrategy[Manifest]:
    """Any manifest."""
    names = st.sampled_from(
        ["adapter_model.safetensors", "ref/adapter_model.bin", "peftstate.tensors"]
    )
    return st.builds(
        Manifest,
        sections=st.fixed_dictionaries(
            {section.name: records(section.record) for section in SECTIONS}
        ),
        files=st.dictionaries(names, records(FileRecord)),
        peftstate_version=st.text(),
    )


@settings(max_examples=15, deadline=None)
@given(_manifests())
def test_round_trip(manifest: Manifest) -> None:
    """Whatever a manifest holds comes back from its bytes, and gives the same bytes."""
    data = manifest.to_json()
    assert read(data) == manifest
    assert read(data).to_json() == data


def test_bytes() -> None:
    """A manifest is sorted, indented JSON of five keys, with a newline at its end."""
    assert dumps(VALUE) == DATA
    sections = {section.name: section.encode(example(section.record)) for section in SECTIONS}
    expected = {
        "schema_version": SCHEMA_VERSION,
        "peftstate_version": peftstate.__version__,
        "sections": sections,
        "files": {"ref/adapter_model.safetensors": {"size": 3, "sha256": SHA}},
    }
    assert {key: item for key, item in VALUE.items() if key != "digest"} == expected
    assert read(DATA) == MANIFEST


def test_digest() -> None:
    """It is the seal that is written; another state has another one."""
    assert MANIFEST.digest == read(DATA).digest == VALUE["digest"]
    assert attrs.evolve(MANIFEST, files={}).digest != MANIFEST.digest


def test_bytes_do_not_depend_on_order() -> None:
    """The same state gives the same bytes, in whatever order it was captured."""
    files = {name: FileRecord(size=1, sha256=SHA) for name in ("b", "a", "c")}
    manifest = attrs.evolve(MANIFEST, files=files)
    turned = attrs.evolve(
        MANIFEST,
        sections=dict(reversed(list(MANIFEST.sections.items()))),
        files=dict(reversed(files.items())),
    )
    assert turned.to_json() == manifest.to_json()


def test_bytes_of_a_save(tmp_path: Path, load_base: Any, with_lora: Any) -> None:
    """Two saves of a model are the same to the byte, and neither tells where it was made."""
    model = with_lora(load_base())
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    one, two = ((tmp_path / name / "peftstate.json").read_bytes() for name in ("one", "two"))
    assert one == two
    assert str(tmp_path.parent).encode() not in one
    assert str(Path.cwd()).encode() not in one
    assert one == peftstate.read_manifest(tmp_path / "one").to_json()


def test_seal() -> None:
    """The seal is BLAKE3 over the rest without spaces, so that another layout keeps it."""
    content = {key: item for key, item in VALUE.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert VALUE["digest"] == blake3(text.encode()).hexdigest()
    assert read(json.dumps(VALUE, sort_keys=False).encode()) == MANIFEST


def _changed(position: int, bit: int) -> bytes:
    """The manifest with one bit turned."""
    data = bytearray(DATA)
    data[position] ^= 1 << bit
    return bytes(data)


def test_any_changed_byte() -> None:
    """A changed byte is an error wherever it is, or it changed nothing, as among spaces."""
    refused = 0
    for position in range(0, len(DATA), 5):
        try:
            manifest = read(_changed(position, position % 8))
        except (IntegrityError, ManifestDecodeError):
            refused += 1
        else:
            assert manifest == MANIFEST
            assert DATA[position : position + 1].isspace()
    assert refused > len(DATA) / 5 / 3


@settings(deadline=None)
@given(st.integers(1, len(DATA) - 1))
def test_cut(length: int) -> None:
    """A manifest that was not written to the end is refused."""
    if DATA[:length].rstrip() == DATA.rstrip():
        return
    with pytest.raises(ManifestDecodeError, match="not UTF-8 JSON"):
        read(DATA[:length])


def test_seal_broken() -> None:
    """A changed value is told from a difference of the model: the seal does not fit."""
    data = DATA.replace(b'"size": 3', b'"size": 4')
    with pytest.raises(IntegrityError) as caught:
        read(data)
    assert caught.value.file == "a/peftstate.json"
    assert caught.value.expected == f"digest {VALUE['digest']}"
    assert re.fullmatch("digest [0-9a-f]{64}", caught.value.actual)
    assert caught.value.actual != caught.value.expected


@pytest.mark.parametrize("digest", [None, 1, [], "", "0" * 64, VALUE["digest"].upper()])
def test_seal_wrong(digest: Any) -> None:
    """A seal is the one right string and nothing else."""
    with pytest.raises(IntegrityError):
        read(dumps({**VALUE, "digest": digest}))


@pytest.mark.parametrize("version", ["missing", None, "1", 1.0, True, [1]])
def test_schema_version_of_wrong_type(version: Any) -> None:
    """The version is an integer; anything else is no manifest of ours."""
    value = {**VALUE, "schema_version": version}
    if version == "missing":
        del value["schema_version"]
    with pytest.raises(ManifestDecodeError) as caught:
        read(sealed(value))
    assert str(caught.value) == "a/peftstate.json: schema_version: expected an integer"
    assert caught.value.field == "schema_version"


@pytest.mark.parametrize("version", [-1, 0, SCHEMA_VERSION + 1, 10**30])
def test_schema_version_unknown(version: int) -> None:
    """The version is looked at before all else: of an unknown one nothing else is known."""
    with pytest.raises(SchemaVersionError) as caught:
        read(dumps({"schema_version": version, "new": {"key": "value"}}))
    assert (caught.value.found, caught.value.supported) == (version, SCHEMA_VERSION)
    assert caught.value.path == "a/peftstate.json"


def test_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old manifest is brought up to date step by step, its seal checked before."""

    def upgrade(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda content: {**content, "peftstate_version": content["peftstate_version"] + key}

    monkeypatch.setattr(module, "SCHEMA_VERSION", SCHEMA_VERSION + 2)
    steps = {SCHEMA_VERSION: upgrade(" a"), SCHEMA_VERSION + 1: upgrade(" b")}
    monkeypatch.setattr(module, "UPGRADES", {**UPGRADES, **steps})
    manifest = read(DATA)
    assert manifest.peftstate_version == VALUE["peftstate_version"] + " a b"
    assert manifest.schema_version == SCHEMA_VERSION + 2
    assert manifest.sections.keys() == VALUE["sections"].keys()
    with pytest.raises(IntegrityError):
        read(DATA.replace(b'"size": 3', b'"size": 4'))


def test_upgrades_complete() -> None:
    """Each schema version but the newest has its step to the next."""
    assert set(UPGRADES) == set(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize("data", [b"[]", b"null", b'"peftstate"', b"1"])
def test_no_object(data: bytes) -> None:
    """A manifest is an object."""
    with pytest.raises(ManifestDecodeError) as caught:
        read(data)
    assert str(caught.value) == "a/peftstate.json: the manifest is not an object"


@pytest.mark.parametrize("key", ["peftstate_version", "sections", "files", "digest"])
def test_missing_key(key: str) -> None:
    """All keys must be there."""
    with pytest.raises(ManifestDecodeError, match=r"is missing$") as caught:
        read(dumps({name: item for name, item in VALUE.items() if name != key}))
    assert caught.value.field == key


def _refusals() -> list[tuple[Callable[[dict[str, Any]], Any], str, str]]:
    """Edits of a manifest, with the field and the message of the error that they lead to."""
    return [
        (lambda v: v.update(x=1), "x", "unknown key"),
        (lambda v: v.update({"a b": 1}), "[a b]", "unknown key"),
        (lambda v: v.update(peftstate_version=1), "peftstate_version", "expected a string"),
        (lambda v: v.update(sections=[]), "sections", "expected an object"),
        (lambda v: v["sections"].pop("rng"), "sections.rng", "is missing"),
        (lambda v: v["sections"].update(new={}), "sections.new", "unknown section"),
        (lambda v: v["sections"].update({"a.b": {}}), "sections[a.b]", "unknown section"),
        (
            lambda v: v["sections"].update(dtype=None),
            "sections.dtype",
            "expected an object, found null",
        ),
        (
            lambda v: v["sections"]["dtype"].update(more=1),
            "sections.dtype",
            "unknown key 'more'",
        ),
        (
            lambda v: v["sections"]["rng"]["numpy"].pop("position"),
            "sections.rng.numpy.position",
            "is missing",
        ),
        (
            lambda v: v["sections"]["rng"]["accelerators"].update({"cuda:0": 1}),
            "sections.rng.accelerators[cuda:0]",
            "expected an object, found an integer",
        ),
        (
            lambda v: v["sections"]["adapters"]["adapters"]["a.b"]["tensors"]["a.b"].update(
                shape=[2, 64.0]
            ),
            "sections.adapters.adapters[a.b].tensors[a.b].shape[1]",
            "expected an integer, found a float",
        ),
        (lambda v: v.update(files=None), "files", "expected an object"),
        (
            lambda v: v["files"].update({"a.bin": []}),
            "files[a.bin]",
            "expected an object, found an array",
        ),
        (
            lambda v: v["files"].update({"a.bin": {"size": True, "sha256": SHA}}),
            "files[a.bin].size",
            "expected an integer, found a boolean",
        ),
        (
            lambda v: v["files"].update({"a.bin": {"size": 1}}),
            "files[a.bin].sha256",
            "is missing",
        ),
        (
            lambda v: v["files"].update({"../a.bin": {"size": 1, "sha256": SHA}}),
            "files[../a.bin]",
            "'../a.bin' has a part that is '.' or '..'",
        ),
        (
            lambda v: v["files"].update({"/etc": {"size": 1, "sha256": SHA}}),
            "files[/etc]",
            "'/etc' has an empty part, or is absolute",
        ),
    ]


@pytest.mark.parametrize(("edit", "field", "message"), _refusals())
def test_refused(edit: Callable[[dict[str, Any]], Any], field: str, message: str) -> None:
    """What the format does not allow is refused, also when its seal is right, and named."""
    with pytest.raises(ManifestDecodeError) as caught:
        read(edited(edit))
    assert caught.value.field == field
    assert caught.value.path == "a/peftstate.json"
    assert str(caught.value) == f"a/peftstate.json: {field}: {message}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_sections_required(section: Any) -> None:
    """Each section must be there, but for those that say that they are optional."""
    data = edited(lambda value: value["sections"].pop(section.name, None))
    if section.is_optional:
        assert section.name not in read(data).sections
        return
    with pytest.raises(ManifestDecodeError, match=r"is missing$") as caught:
        read(data)
    assert caught.value.field == f"sections.{section.name}"


def test_edited_is_read() -> None:
    """The helper of these tests seals as a save does."""
    assert read(edited(lambda _: None)) == MANIFEST
