"""Reading an adapter folder, from the disk and from the Hub."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from peftstate._folder import AdapterFolder, open_folder
from peftstate._storage import (
    ADAPTER_CONFIG_NAME,
    COMPLETE_NAME,
    MANIFEST_NAME,
    SIDECAR_NAME,
    WEIGHTS_NAMES,
    mark_removed,
    removal_mark,
    staged,
)
from peftstate.errors import AdapterNotFoundError, IntegrityError, ManifestNotFoundError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/adapter"
SAFETENSORS, BIN = WEIGHTS_NAMES


def write(folder: Path, **files: str) -> None:
    """Write files, named without their suffixes."""
    names = {
        "config": ADAPTER_CONFIG_NAME,
        "weights": SAFETENSORS,
        "manifest": MANIFEST_NAME,
        "sidecar": SIDECAR_NAME,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / names[name]).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters whose second save was committed, and stopped before the manifests moved."""
    root = tmp_path / "adapter"
    write(root, config="new", weights="new", manifest="old", sidecar="stale")
    write(root / "extra", config="old", weights="new", manifest="old")
    write(root / COMPLETE_NAME, manifest="new")
    mark_removed(root / COMPLETE_NAME / SIDECAR_NAME)
    write(root / COMPLETE_NAME / "extra", config="new", manifest="new", sidecar="new")
    return root


def contents(folder: AdapterFolder, prefix: str = "") -> dict[str, str]:
    """All files that there are, of those that there may be."""
    names = [
        prefix + name for name in (ADAPTER_CONFIG_NAME, SAFETENSORS, MANIFEST_NAME, SIDECAR_NAME)
    ]
    present = [name for name in names if folder.exists(name)]
    for name in set(names) - set(present):
        with pytest.raises(FileNotFoundError):
            folder.read_bytes(name)
    return {name.removeprefix(prefix): folder.read_bytes(name).decode() for name in present}


ROOT_FILES = {ADAPTER_CONFIG_NAME: "new", SAFETENSORS: "new", MANIFEST_NAME: "new"}
EXTRA_FILES = ROOT_FILES | {SIDECAR_NAME: "new"}


def test_pending_save(folder: Path) -> None:
    """Of a save that was not moved to the end, the files come from where they are by now."""
    opened = AdapterFolder.at(folder)
    assert opened.is_pending
    assert contents(opened) == ROOT_FILES
    assert contents(opened, "extra/") == EXTRA_FILES
    assert opened.names() == tuple(sorted(ROOT_FILES))


@pytest.mark.parametrize("how", ["subfolder", "at", "open_folder", "open_folder with subfolder"])
def test_pending_save_of_a_subfolder(folder: Path, how: str) -> None:
    """A sub-folder looks for its files in the save of the folder above it, however it is opened."""
    opened = {
        "subfolder": lambda: AdapterFolder.at(folder).subfolder("extra"),
        "at": lambda: AdapterFolder.at(folder / "extra"),
        "open_folder": lambda: open_folder(folder / "extra"),
        "open_folder with subfolder": lambda: open_folder(str(folder), subfolder="extra"),
    }[how]()
    assert opened.is_pending
    assert contents(opened) == EXTRA_FILES
    assert opened.names() == tuple(sorted(EXTRA_FILES))


def test_pending_first_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sub-folder that a first save has not made yet can be opened by its path."""
    monkeypatch.chdir(folder.parent)
    for path in sorted((folder / "extra").iterdir()):
        path.rename(folder / COMPLETE_NAME / "extra" / path.name)
    (folder / "extra").rmdir()
    for name in (str(folder / "extra"), f"{folder.name}/extra"):  # the latter might be a repo
        assert open_folder(name, local_files_only=True).read_bytes(SAFETENSORS) == b"new"


def test_inner_save_comes_first(folder: Path) -> None:
    """A save into the sub-folder itself is newer than one of the folder above it."""
    write(folder / "extra" / COMPLETE_NAME, config="newest")
    for opened in (AdapterFolder.at(folder).subfolder("extra"), AdapterFolder.at(folder / "extra")):
        assert opened.read_bytes(ADAPTER_CONFIG_NAME) == b"newest"
        assert opened.read_bytes(MANIFEST_NAME) == b"new"
    assert AdapterFolder.at(folder).read_bytes(f"extra/{ADAPTER_CONFIG_NAME}") == b"newest"


def test_settled_folder(tmp_path: Path) -> None:
    """A folder without a save in progress holds what is in it, sub-folders and traces apart."""
    write(tmp_path, config="old", manifest="old")
    write(tmp_path / "extra", config="old")
    write(tmp_path / ".peftstate-staging-of-somebody", config="new")
    removal_mark(tmp_path / "README.md").touch()
    (tmp_path / ".gitattributes").touch()
    opened = AdapterFolder.at(tmp_path)
    assert not opened.is_pending
    assert opened.commit is None
    assert opened.names() == (".gitattributes", ADAPTER_CONFIG_NAME, MANIFEST_NAME)
    assert contents(opened) == {ADAPTER_CONFIG_NAME: "old", MANIFEST_NAME: "old"}


def test_missing_folder(tmp_path: Path) -> None:
    """In a folder that does not exist, all files are missing."""
    opened = AdapterFolder.at(tmp_path / "missing")
    assert opened.names() == ()
    assert contents(opened) == {}
    assert opened.generation() == (None, None, None)


def test_missing_manifest(tmp_path: Path) -> None:
    """A missing manifest has an error of its own, which names the path."""
    opened = AdapterFolder.at(tmp_path)
    for name in (MANIFEST_NAME, f"extra/{MANIFEST_NAME}"):
        with pytest.raises(ManifestNotFoundError) as caught:
            opened.read_bytes(name)
        assert caught.value.path == str(tmp_path / name)
    with pytest.raises(FileNotFoundError) as missing:
        opened.read_bytes(SIDECAR_NAME)
    assert missing.value.filename == str(tmp_path / SIDECAR_NAME)


@pytest.mark.parametrize("name", ["../file", "/etc/passwd", f"{COMPLETE_NAME}/file", "a/b/c"])
def test_unsafe_name(tmp_path: Path, name: str) -> None:
    """No name reaches the disk that could mean a file elsewhere."""
    opened = AdapterFolder.at(tmp_path)
    for use in (opened.read_bytes, opened.exists, opened.subfolder):
        with pytest.raises(ValueError, match=r"has|kept"):
            use(name)


def test_limit(tmp_path: Path) -> None:
    """A file that is larger than expected is refused before it is read."""
    write(tmp_path, manifest="12345")
    opened = AdapterFolder.at(tmp_path)
    assert opened.read_bytes(MANIFEST_NAME, limit=5) == b"12345"
    with pytest.raises(IntegrityError, match="at most 4 bytes") as caught:
        opened.read_bytes(MANIFEST_NAME, limit=4)
    assert caught.value.file == str(tmp_path / MANIFEST_NAME)


def test_links(tmp_path: Path) -> None:
    """Links lead to files of the folder that was opened, sub-folders included, or are refused."""
    root = tmp_path / "adapter"
    write(root / "extra", config="extra", weights="extra")
    write(tmp_path / "other", config="other", weights="other")
    (root / ADAPTER_CONFIG_NAME).symlink_to(f"extra/{ADAPTER_CONFIG_NAME}")
    (root / SAFETENSORS).symlink_to(f"../other/{SAFETENSORS}")
    (root / "linked").symlink_to("../other")
    opened = AdapterFolder.at(root)
    assert opened.read_bytes(ADAPTER_CONFIG_NAME) == b"extra"
    for name in (SAFETENSORS, f"linked/{SAFETENSORS}"):
        with pytest.raises(IntegrityError, match="a link to"):
            opened.read_bytes(name)
    with pytest.raises(IntegrityError, match="a link to"):
        opened.subfolder("linked").read_bytes(SAFETENSORS)
    assert AdapterFolder.at(root / "linked").read_bytes(SAFETENSORS) == b"other"


def test_link_through_a_false_complete_folder(tmp_path: Path) -> None:
    """A link in the place of the complete folder above does not make other folders readable."""
    write(tmp_path / "other", config="other")
    (tmp_path / COMPLETE_NAME).symlink_to("other")
    (tmp_path / "adapter").mkdir()
    link = tmp_path / "adapter" / ADAPTER_CONFIG_NAME
    link.symlink_to(f"../{COMPLETE_NAME}/{ADAPTER_CONFIG_NAME}")
    with pytest.raises(IntegrityError, match="a link to"):
        AdapterFolder.at(tmp_path / "adapter").read_bytes(ADAPTER_CONFIG_NAME)


def test_generation_changes_with_a_save(tmp_path: Path) -> None:
    """The token changes when a save is committed, when it moves files and when it ends."""
    opened = AdapterFolder.at(tmp_path / "adapter")
    tokens = [opened.generation()]
    replace = os.replace

    def observed(source: Path, target: Path) -> None:
        tokens.append(opened.generation())
        replace(source, target)

    for text in ("old", "new"):
        with pytest.MonkeyPatch.context() as patch, staged(opened.path) as staging:
            write(staging, config=text, manifest=text)
            tokens.append(opened.generation())
            patch.setattr(os, "replace", observed)
        tokens.append(opened.generation())
        assert tokens[-1] == opened.generation()
    empty, old_written, *old_moves, old, new_written, new_move, _, new = tokens
    assert old_written == empty
    assert len({empty, *old_moves, old}) >= 3
    assert new_written == old
    assert len({old, new_move, new}) == 3


def test_generation_of_a_subfolder(folder: Path) -> None:
    """The token of a sub-folder changes with the save of the folder above it."""
    opened = AdapterFolder.at(folder / "extra")
    before = opened.generation()
    with staged(folder):
        pass
    assert opened.generation() != before
    assert contents(opened) == EXTRA_FILES


def test_folder_pickles(tmp_path: Path) -> None:
    """A folder can be handed to another process."""
    opened = AdapterFolder.at(tmp_path).subfolder("extra")
    assert pickle.loads(pickle.dumps(opened)) == opened  # noqa: S301 - our own bytes


def test_open_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder goes before a repo of the same name, whatever it holds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    opened = open_folder(REPO)
    assert opened.path == tmp_path / REPO
    assert contents(opened) == {}
    (tmp_path / "link").symlink_to(REPO)
    assert open_folder("link").path == tmp_path / REPO


def test_open_missing_path(tmp_path: Path) -> None:
    """A path that cannot be the name of a repo is a folder without files."""
    opened = open_folder(tmp_path / "missing", subfolder="extra")
    assert opened.path == tmp_path / "missing" / "extra"
    assert not opened.exists(ADAPTER_CONFIG_NAME)


def in_cache(cache: Path, files: dict[str, str]) -> None:
    """Lay files out as the Hub's cache does: links in snapshots to blobs."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir(exist_ok=True)
    for number, (name, text) in enumerate(files.items()):
        blob = repo / "blobs" / f"{number:040x}"
        blob.write_text(text)
        link = repo / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
@pytest.mark.parametrize("subfolder", [None, "extra"])
def test_open_cached_repo(tmp_path: Path, revision: str | None, subfolder: str | None) -> None:
    """What the Hub's cache holds is read through its links; the rest is absent."""
    prefix = f"{subfolder}/" if subfolder else ""
    in_cache(tmp_path, {f"{prefix}{name}": name for name in (ADAPTER_CONFIG_NAME, MANIFEST_NAME)})
    opened = open_folder(
        REPO, revision=revision, subfolder=subfolder, cache_dir=tmp_path, local_files_only=True
    )
    assert contents(opened) == {name: name for name in (ADAPTER_CONFIG_NAME, MANIFEST_NAME)}
    assert opened.commit == COMMIT
    assert not opened.is_pending


def test_link_out_of_the_cache(tmp_path: Path) -> None:
    """In the Hub's cache too, a link to anything but a blob is refused."""
    in_cache(tmp_path, {ADAPTER_CONFIG_NAME: "config"})
    opened = open_folder(REPO, cache_dir=tmp_path, local_files_only=True)
    (tmp_path / "planted").write_text("planted")
    (opened.path / MANIFEST_NAME).symlink_to(tmp_path / "planted")
    with pytest.raises(IntegrityError, match="a link to"):
        opened.read_bytes(MANIFEST_NAME)


def share_blobs(cache: Path, *, marked: bool = True) -> Path:
    """Move the blobs of the repo to where huggingface_hub 2 keeps those that repos share."""
    store = cache / "blobs"
    store.mkdir()
    if marked:
        (store / ".huggingface-shared-blobs").write_text("1\n")
    for number, blob in enumerate((cache / f"models--{REPO.replace('/', '--')}/blobs").iterdir()):
        shared = store / f"{number:02x}" / f"{number:02x}{'0' * 62}"
        shared.parent.mkdir()
        blob.rename(shared)
        blob.symlink_to(os.path.relpath(shared, blob.parent))
    return store


@pytest.mark.parametrize("subfolder", [None, "extra"])
def test_blobs_that_repos_share(tmp_path: Path, subfolder: str | None) -> None:
    """In the cache of huggingface_hub 2, a blob is itself a link to one that several repos have."""
    prefix = f"{subfolder}/" if subfolder else ""
    in_cache(tmp_path, {f"{prefix}{name}": name for name in (ADAPTER_CONFIG_NAME, MANIFEST_NAME)})
    share_blobs(tmp_path)
    opened = open_folder(REPO, subfolder=subfolder, cache_dir=tmp_path, local_files_only=True)
    assert contents(opened) == {name: name for name in (ADAPTER_CONFIG_NAME, MANIFEST_NAME)}
    assert opened.commit == COMMIT


def test_a_folder_beside_repos_that_is_not_the_caches(tmp_path: Path) -> None:
    """A folder that only bears the name of the shared blobs is like any other one elsewhere."""
    in_cache(tmp_path, {ADAPTER_CONFIG_NAME: "config"})
    share_blobs(tmp_path, marked=False)
    opened = open_folder(REPO, cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(IntegrityError, match="a link to"):
        opened.read_bytes(ADAPTER_CONFIG_NAME)


def test_links_out_of_shared_blobs(tmp_path: Path) -> None:
    """From a shared blob no link leads on, nor is the store for folders outside the cache."""
    in_cache(tmp_path, {ADAPTER_CONFIG_NAME: "config"})
    store = share_blobs(tmp_path)
    (tmp_path / "planted").write_text("planted")
    (store / "link").symlink_to(tmp_path / "planted")
    opened = open_folder(REPO, cache_dir=tmp_path, local_files_only=True)
    (opened.path / MANIFEST_NAME).symlink_to(store / "link")
    outside = tmp_path / "outside" / "adapter"
    outside.mkdir(parents=True)
    (outside / MANIFEST_NAME).symlink_to(next(store.glob("00/*")))
    for folder in (opened, AdapterFolder.at(outside)):
        with pytest.raises(IntegrityError, match="a link to"):
            folder.read_bytes(MANIFEST_NAME)


def test_the_caches_own_shared_blobs(tmp_path: Path) -> None:
    """The layout that these tests make is the one of the installed huggingface_hub."""
    shared_blobs = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    in_cache(tmp_path, {ADAPTER_CONFIG_NAME: "config"})
    store = share_blobs(tmp_path)
    assert shared_blobs.shared_blobs_dir(tmp_path) == store
    assert shared_blobs.is_shared_blobs_dir(store)
    blob = next((tmp_path / f"models--{REPO.replace('/', '--')}/blobs").iterdir())
    assert shared_blobs.shared_blob_target(blob, tmp_path) == blob.resolve()


def test_open_repo_that_is_not_cached(tmp_path: Path) -> None:
    """Without the Hub, an unknown repo is one error that chains the Hub library's own."""
    with pytest.raises(AdapterNotFoundError) as caught:
        open_folder(REPO, cache_dir=tmp_path, local_files_only=True)
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)


OPEN = """
import json, sys
from peftstate._folder import open_folder

options = json.loads(sys.argv[2])
folder = open_folder(sys.argv[1], **options)
print(json.dumps({
    "path": str(folder.path),
    "commit": folder.commit,
    "files": {name: folder.read_bytes(name).decode() for name in folder.names()},
}))
"""


def open_elsewhere(cache: Path, environment: dict[str, str], **options: str) -> dict[str, Any]:
    """Open the repo in another process: the Hub library reads its settings when imported."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    settings = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", OPEN, REPO, json.dumps(options)],
        env=clean | settings | environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def test_open_offline(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE set, the cache alone is asked."""
    in_cache(tmp_path, {ADAPTER_CONFIG_NAME: "config", MANIFEST_NAME: "manifest"})
    opened = open_elsewhere(tmp_path, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://localhost:9"})
    assert opened["commit"] == COMMIT
    assert opened["files"] == {ADAPTER_CONFIG_NAME: "config", MANIFEST_NAME: "manifest"}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download of files needs."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        """Answer for a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer for the repo, for the list of its files, or for a file."""
        path = urllib.parse.unquote(self.path.partition("?")[0])
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": f"{number:040x}"}
            for number, (name, data) in enumerate(self.files.items())
        ]
        siblings = [{"rfilename": name} for name in self.files]
        api = f"/api/models/{REPO}"
        if path == f"{api}/revision/main":
            self.answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            self.answer(json.dumps(tree).encode())
        elif (name := path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")) in self.files:
            self.asked.append(name)
            self.answer(self.files[name])
        else:
            self.send_error(404)

    def answer(self, data: bytes) -> None:
        """Send an answer."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{abs(hash(self.path)):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub with one repo, and the files that it was asked for."""
    names = (
        ADAPTER_CONFIG_NAME,
        SAFETENSORS,
        MANIFEST_NAME,
        "peftstate.rank-00001-of-00002.tensors",
    )
    files = {
        f"{folder}{name}": f"{folder}{name}" for folder in ("", "extra/", "e[x]/") for name in names
    }
    files |= {name: name for name in ("model.safetensors", "README.md", f"{COMPLETE_NAME}/x.json")}
    asked: list[str] = []
    members = {"files": {name: text.encode() for name, text in files.items()}, "asked": asked}
    handler = type("OneRepo", (Hub,), members)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("subfolder", [None, "extra", "e[x]"])
def test_open_repo(tmp_path: Path, hub: tuple[str, list[str]], subfolder: str | None) -> None:
    """Of a repo, only the adapter's files are downloaded, and only those of the folder."""
    endpoint, asked = hub
    options = {} if subfolder is None else {"subfolder": subfolder}
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    opened = open_elsewhere(tmp_path, settings, **options)
    prefix = f"{subfolder}/" if subfolder else ""
    names = {
        ADAPTER_CONFIG_NAME,
        SAFETENSORS,
        MANIFEST_NAME,
        "peftstate.rank-00001-of-00002.tensors",
    }
    assert opened["files"] == {name: prefix + name for name in names}
    assert opened["commit"] == COMMIT
    assert set(asked) == {prefix + name for name in names}
