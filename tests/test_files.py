"""What is said of a saved state without a model: `read_manifest`, `verify_files`, `diff`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest

from peftstate import _files, diff, read_manifest, verify_files
from peftstate._diff import ABSENT, PRESENT, Mismatch
from peftstate._digest import file_digest
from peftstate._folder import AdapterFolder
from peftstate._storage import staged
from peftstate.errors import (
    IntegrityError,
    ManifestDecodeError,
    ManifestNotFoundError,
    SchemaVersionError,
)
from peftstate.manifest import FileRecord, Manifest
from peftstate.sections import SECTIONS
from tests._records import example

FILES = {"adapter_model.safetensors": b"weights", "ref/adapter_model.safetensors": b"more"}
MANIFEST = Manifest(
    sections={section.name: example(section.record) for section in SECTIONS},
    files={
        name: FileRecord(size=len(data), sha256=file_digest(data)) for name, data in FILES.items()
    },
)


def write(folder: Path, manifest: Manifest = MANIFEST) -> None:
    """Write a manifest and the files that it is of."""
    (folder / "ref").mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
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
        (good.replace(b'"schema_version": 1', b'"schema_version": 999'), SchemaVersionError),
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
    read_bytes = AdapterFolder.read_bytes

    def and_then_saved(self: AdapterFolder, name: str, *, limit: int | None = None) -> bytes:
        data = read_bytes(self, name, limit=limit)
        if data == b"{":
            write(folder)
        return data

    monkeypatch.setattr(AdapterFolder, "read_bytes", and_then_saved)
    assert read_manifest(folder) == MANIFEST


def test_verify_files(folder: Path) -> None:
    """Files that are as they were saved are in order; others in the folder do not matter."""
    (folder / "README.md").write_text("hello")
    report = verify_files(folder)
    assert report.ok
    assert report.sections == ("files",)
    assert str(report) == "files  ok"


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
    """A file that is gone is a mismatch."""
    shutil.rmtree(folder / "ref")
    (mismatch,) = verify_files(folder).mismatches
    assert mismatch.path == "files[ref/adapter_model.safetensors]"
    assert mismatch.found is ABSENT


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
    with pytest.raises(IntegrityError, match="found a link to"):
        verify_files(folder)


def test_verify_files_of_an_unfinished_save(folder: Path) -> None:
    """Of a save whose files were not all moved, the new files are verified."""
    other = {name: data + b"!" for name, data in FILES.items()}
    files = {name: FileRecord(size=len(d), sha256=file_digest(d)) for name, d in other.items()}
    complete = folder / ".peftstate-complete"
    (complete / "ref").mkdir(parents=True)
    for name, data in other.items():
        (complete / name).write_bytes(data)
    (complete / "peftstate.json").write_bytes(attrs.evolve(MANIFEST, files=files).to_json())
    assert read_manifest(folder).files == files
    assert verify_files(folder).ok


def test_verify_files_between_saves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save between the manifest and the files is no difference."""
    read_bytes = AdapterFolder.read_bytes
    new = attrs.evolve(
        MANIFEST,
        files={"adapter_model.safetensors": FileRecord(size=3, sha256=file_digest(b"new"))},
    )
    pending = [True]

    def and_then_saved(self: AdapterFolder, name: str, *, limit: int | None = None) -> bytes:
        data = read_bytes(self, name, limit=limit)
        if pending and pending.pop():
            with staged(folder) as staging:
                (staging / "adapter_model.safetensors").write_bytes(b"new")
                (staging / "peftstate.json").write_bytes(new.to_json())
        return data

    monkeypatch.setattr(AdapterFolder, "read_bytes", and_then_saved)
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
