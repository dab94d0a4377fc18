"""What is said of a saved state without a model: `read_manifest`, `verify_files`, `diff`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from benchmarks._faults.edits import permissions_obeyed
from peftstate import _files, diff, read_manifest, verify_files
from peftstate._diff import ABSENT, PRESENT, Mismatch
from peftstate._digest import file_digest
from peftstate._folder import AdapterFolder
from peftstate._report import Report
from peftstate._storage import staged
from peftstate.errors import (
    AdapterMismatchError,
    IntegrityError,
    ManifestDecodeError,
    ManifestNotFoundError,
    SchemaVersionError,
)
from peftstate.manifest import FileRecord, Manifest
from peftstate.sections import SECTIONS
from tests._records import example

FILES = {"adapter_model.safetensors": b"weights", "ref/adapter_model.safetensors": b"more"}
CONFIG = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def manifest(*folders: str, files: Mapping[str, bytes] = FILES) -> Manifest:
    """A manifest of adapters in these folders, named after them."""
    sections = {section.name: example(section.record) for section in SECTIONS}
    (record,) = sections["adapters"].adapters.values()
    adapters = {
        "default" if folder == "." else folder: attrs.evolve(record, folder=folder, config=CONFIG)
        for folder in folders
    }
    sections["adapters"] = attrs.evolve(sections["adapters"], adapters=adapters)
    sections["rng"] = attrs.evolve(sections["rng"], process=None)
    return Manifest(sections=sections, files={name: recorded(files[name]) for name in files})


def recorded(data: bytes) -> FileRecord:
    """A file as a manifest describes it."""
    return FileRecord(size=len(data), sha256=file_digest(data))


MANIFEST = manifest(".", "ref")


def write(folder: Path, manifest: Manifest = MANIFEST) -> None:
    """Write a manifest and the files that it is of."""
    (folder / "ref").mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
        (folder / name).with_name("adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "peftstate.json").write_bytes(manifest.to_json())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a manifest and two files."""
    write(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_read_manifest(folder: Path) -> None:
    """The manifest of a folder is read, given in whatever way a path is given."""
    assert read_manifest(folder) == MANIFEST
    assert read_manifest(str(folder)) == MANIFEST
    assert read_manifest(folder.parent, subfolder="adapter") == MANIFEST


def test_read_manifest_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is one of the working directory."""
    monkeypatch.chdir(folder.parent)
    assert read_manifest("adapter") == MANIFEST


def test_read_manifest_missing(folder: Path) -> None:
    """A folder without a manifest is an error that names the file."""
    (folder / "peftstate.json").unlink()
    for function in (read_manifest, verify_files):
        with pytest.raises(ManifestNotFoundError) as caught:
            function(folder)
        assert caught.value.path == str(folder / "peftstate.json")
    with pytest.raises(FileNotFoundError):
        read_manifest(folder)


def test_read_manifest_damaged(folder: Path) -> None:
    """What is wrong with a manifest names its file."""
    path = folder / "peftstate.json"
    good = path.read_bytes()
    cases: list[tuple[bytes, type[Exception]]] = [
        (b"", ManifestDecodeError),
        (good[:-20], ManifestDecodeError),
        (good.replace(b'"size": 7', b'"size": 8'), IntegrityError),
        (good.replace(b'"schema_version": 3', b'"schema_version": 999'), SchemaVersionError),
    ]
    for data, error in cases:
        assert data != good
        path.write_bytes(data)
        for function in (read_manifest, verify_files):
            with pytest.raises(error) as caught:
                function(folder)
            assert str(caught.value).startswith(f"{path}: ")


def test_read_manifest_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest larger than any real one is refused before it is read."""
    size = (folder / "peftstate.json").stat().st_size
    monkeypatch.setattr(_files, "MAX_BYTES", size)
    assert read_manifest(folder) == MANIFEST
    monkeypatch.setattr(_files, "MAX_BYTES", size - 1)
    with pytest.raises(IntegrityError, match=f"saved at most {size - 1} bytes, found {size} bytes"):
        read_manifest(folder)


def test_read_manifest_link(folder: Path, tmp_path: Path) -> None:
    """A manifest that is a link to another place is refused."""
    shutil.move(folder / "peftstate.json", tmp_path / "elsewhere.json")
    (folder / "peftstate.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(IntegrityError, match="found a link to"):
        read_manifest(folder)


def test_read_manifest_between_saves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that meets a save reads again, and gets the new manifest."""
    path = folder / "peftstate.json"
    path.write_bytes(b"{")
    read = AdapterFolder.read

    def and_then_saved(self: AdapterFolder, name: str, **limits: Any) -> memoryview:
        data = read(self, name, **limits)
        if bytes(data) == b"{":
            write(folder)
        return data

    monkeypatch.setattr(AdapterFolder, "read", and_then_saved)
    assert read_manifest(folder) == MANIFEST


def test_verify_files(folder: Path) -> None:
    """Files that are as they were saved are in order."""
    report = verify_files(folder)
    assert report == Report((), ("files", "adapters"))
    assert str(report) == "files     ok\nadapters  ok"


def test_verify_files_changed(folder: Path) -> None:
    """A file of other bytes is a mismatch of its digest, one of another length of its size too."""
    (folder / "adapter_model.safetensors").write_bytes(b"Weights")
    (folder / "ref" / "adapter_model.safetensors").write_bytes(b"less!")
    report = verify_files(folder)
    own, extra = "[adapter_model.safetensors]", "[ref/adapter_model.safetensors]"
    assert report.mismatches == (
        Mismatch("files", f"{own}.sha256", file_digest(b"weights"), file_digest(b"Weights")),
        Mismatch("files", f"{extra}.sha256", file_digest(b"more"), file_digest(b"less!")),
        Mismatch("files", f"{extra}.size", 4, 5),
    )
    with pytest.raises(IntegrityError) as caught:
        report.raise_for_mismatch()
    assert caught.value.file == "adapter_model.safetensors"


def test_verify_files_missing(folder: Path) -> None:
    """A file that is gone is a mismatch, a config too."""
    shutil.rmtree(folder / "ref")
    config, weights = verify_files(folder).mismatches
    assert (weights.path, weights.found) == ("files[ref/adapter_model.safetensors]", ABSENT)
    assert str(config) == "files[ref/adapter_config.json]: saved 'a file', found 'no file'"


def test_verify_files_in_a_file(folder: Path) -> None:
    """What should be in a folder of which a file has the place is missing."""
    expected = [mismatch.path for mismatch in _without_ref(folder)]
    (folder / "ref").write_text("no folder")
    report = verify_files(folder)
    assert [mismatch.path for mismatch in report.mismatches] == expected
    assert report.notes == ("not covered by the manifest: ref",)


def _without_ref(folder: Path) -> tuple[Mismatch, ...]:
    """The mismatches when the folder of the extra adapter is gone."""
    shutil.rmtree(folder / "ref")
    return verify_files(folder).mismatches


def test_verify_files_no_file(folder: Path, tmp_path: Path) -> None:
    """What is no file that can be read here is a mismatch that says what it is."""
    weights, config = (
        folder / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    weights.unlink()
    weights.mkdir()
    (tmp_path / "elsewhere.json").write_text(json.dumps(CONFIG))
    config.unlink()
    config.symlink_to(tmp_path / "elsewhere.json")
    (folder / "ref" / weights.name).chmod(0)
    with permissions_obeyed():
        found = {
            mismatch.field: str(mismatch.found) for mismatch in verify_files(folder).mismatches
        }
    assert found["[adapter_model.safetensors]"].startswith("d")
    assert found["[adapter_config.json]"] == f"a link to {tmp_path / 'elsewhere.json'}"
    assert "Permission denied" in found["[ref/adapter_model.safetensors]"]


def test_verify_files_config(folder: Path) -> None:
    """A PEFT config is compared by its fields, not by its bytes, nor where it says nothing."""
    path = folder / "ref" / "adapter_config.json"
    other = {**CONFIG, "target_modules": ["v_proj", "q_proj"], "base_model_name_or_path": "other"}
    path.write_text(json.dumps(other, indent=8))
    assert verify_files(folder).ok
    path.write_text(json.dumps({**CONFIG, "r": 8}))
    report = verify_files(folder)
    assert report.mismatches == (Mismatch("adapters", "adapters.ref.config.r", 4, 8),)
    with pytest.raises(AdapterMismatchError):
        report.raise_for_mismatch()
    path.write_text("{")
    (mismatch,) = verify_files(folder).mismatches
    assert mismatch.field == "[ref/adapter_config.json]"
    assert str(mismatch.found).startswith("something else (not UTF-8 JSON")


def test_verify_files_of_extra_adapters(folder: Path) -> None:
    """The folder of an extra adapter is compared with its own manifest too, which has a sidecar."""
    files = {"adapter_model.safetensors": b"more", "peftstate.tensors": b"states"}
    for name, data in files.items():
        (folder / "ref" / name).write_bytes(data)
    (folder / "ref" / "peftstate.json").write_bytes(manifest(".", files=files).to_json())
    assert verify_files(folder) == Report((), ("files", "adapters"))
    (folder / "ref" / "peftstate.tensors").write_bytes(b"STATES")
    (folder / "ref" / "adapter_model.safetensors").write_bytes(b"MORE")
    assert [mismatch.field for mismatch in verify_files(folder).mismatches] == [
        "[ref/adapter_model.safetensors].sha256",
        "[ref/peftstate.tensors].sha256",
    ]
    (folder / "ref" / "peftstate.json").write_bytes(b"{")
    with pytest.raises(ManifestDecodeError) as caught:
        verify_files(folder)
    assert caught.value.path == str(folder / "ref" / "peftstate.json")


def test_verify_files_beside(folder: Path) -> None:
    """Files that the manifest says nothing of are named, and are no difference."""
    for name in ("README.md", "ref/notes.txt"):
        (folder / name).write_text("hello")
    report = verify_files(folder)
    assert report.ok
    assert report.notes == ("not covered by the manifest: README.md, ref/notes.txt",)
    for number in range(20):
        (folder / f"{number:02}").touch()
    (note,) = verify_files(folder).notes
    assert note.endswith("09, 10, 11 and 10 more")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
)
def test_verify_files_beside_a_base_model(folder: Path, name: str) -> None:
    """Weights of a whole model in an adapter's folder are what the adapter is applied to twice."""
    (folder / name).touch()
    (folder / "config.json").touch()
    report = verify_files(folder)
    assert report.ok
    base, others = report.notes
    assert base.startswith(f"{name}: weights of a whole model beside adapter_config.json.")
    assert others == "not covered by the manifest: config.json"


def test_verify_files_beside_other_weights(folder: Path) -> None:
    """Weights in the format that was not saved are named: other programs may prefer them."""
    (folder / "ref" / "adapter_model.bin").touch()
    (note,) = verify_files(folder).notes
    assert note.startswith("ref/adapter_model.bin: weights that were not saved with this state")


def test_verify_files_is_not_loading(folder: Path) -> None:
    """Nothing is written, and no file is opened that the manifest does not name."""
    before = sorted(path for path in folder.rglob("*"))
    os.mkfifo(folder / "pipe")
    assert verify_files(folder).ok
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "pipe"])


def test_verify_files_outside(folder: Path, tmp_path: Path) -> None:
    """A manifest cannot have files read that are elsewhere."""
    (tmp_path / "secret").write_bytes(b"s")
    record = FileRecord(size=1, sha256=file_digest(b"s"))
    write(folder, attrs.evolve(MANIFEST, files={"../secret": record}))
    with pytest.raises(ManifestDecodeError) as caught:
        verify_files(folder)
    assert caught.value.field == "files[../secret]"
    (folder / "link").symlink_to(tmp_path / "secret")
    write(folder, attrs.evolve(MANIFEST, files={"link": record}))
    (mismatch,) = verify_files(folder).mismatches
    assert mismatch == Mismatch(
        "files",
        "link",
        {"size": 1, "sha256": record.sha256},
        f"a link to {tmp_path / 'secret'}",
    )


@pytest.mark.parametrize("below", ["../other", "a/b", "/etc", "", "con"])
def test_verify_files_adapters_outside(folder: Path, below: str) -> None:
    """A manifest cannot have the config of an adapter read that is elsewhere."""
    write(folder, manifest(".", below))
    with pytest.raises(ManifestDecodeError) as caught:
        verify_files(folder)
    assert caught.value.field == f"sections.adapters.adapters[{below}].folder"


def test_verify_files_without_an_adapter(folder: Path) -> None:
    """A manifest is of an adapter in its own folder, and of one only."""
    write(folder, manifest("ref"))
    with pytest.raises(ManifestDecodeError) as caught:
        verify_files(folder)
    assert caught.value.field == "sections.adapters.adapters"


def test_verify_files_of_an_unfinished_save(folder: Path) -> None:
    """Of a save whose files were not all moved, the new files are verified."""
    other = {name: data + b"!" for name, data in FILES.items()}
    files = {name: recorded(data) for name, data in other.items()}
    complete = folder / ".peftstate-complete"
    (complete / "ref").mkdir(parents=True)
    for name, data in other.items():
        (complete / name).write_bytes(data)
    (complete / "peftstate.json").write_bytes(attrs.evolve(MANIFEST, files=files).to_json())
    assert read_manifest(folder).files == files
    assert verify_files(folder).ok


def test_verify_files_between_saves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save between the manifest and the files is no difference."""
    read = AdapterFolder.read
    new = attrs.evolve(
        MANIFEST,
        files={"adapter_model.safetensors": recorded(b"new")},
    )
    pending = [True]

    def and_then_saved(self: AdapterFolder, name: str, **limits: Any) -> memoryview:
        data = read(self, name, **limits)
        if pending and pending.pop():
            with staged(folder) as staging:
                (staging / "adapter_model.safetensors").write_bytes(b"new")
                (staging / "peftstate.json").write_bytes(new.to_json())
        return data

    monkeypatch.setattr(AdapterFolder, "read", and_then_saved)
    assert verify_files(folder).ok
    assert not pending


def test_diff_same() -> None:
    """A manifest does not differ from itself, whatever wrote it and whatever files it is of."""
    other = attrs.evolve(MANIFEST, files={}, peftstate_version="0.0.1")
    for found in (MANIFEST, other):
        report = diff(MANIFEST, found)
        assert report.ok
        assert report.sections == tuple(section.name for section in SECTIONS)


def _with(manifest: Manifest, **sections: Any) -> Manifest:
    """A manifest with other records."""
    return attrs.evolve(manifest, sections={**manifest.sections, **sections})


def test_diff() -> None:
    """Each value that differs is a mismatch, in the order of the sections."""
    sections = MANIFEST.sections
    found = _with(
        MANIFEST,
        environment=attrs.evolve(sections["environment"], python="3"),
        adapters=attrs.evolve(sections["adapters"], active=("text", "ref")),
    )
    assert diff(MANIFEST, found).mismatches == (
        Mismatch("adapters", "active[ref]", ABSENT, PRESENT),
        Mismatch("environment", "python", "text", "3"),
    )
    assert diff(found, MANIFEST).mismatches == (
        Mismatch("adapters", "active[ref]", PRESENT, ABSENT),
        Mismatch("environment", "python", "3", "text"),
    )


def test_diff_optional() -> None:
    """A section that only one manifest has is one mismatch."""
    name = SECTIONS[-1].name
    without = attrs.evolve(
        MANIFEST, sections={key: item for key, item in MANIFEST.sections.items() if key != name}
    )
    (mismatch,) = diff(MANIFEST, without).mismatches
    assert (mismatch.section, mismatch.field, mismatch.found) == (name, "", ABSENT)
