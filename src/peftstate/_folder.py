"""Reading an adapter folder: from a local path or the Hub, in the middle of a save or after one.

A save that was committed but whose files have not all been moved (`peftstate._storage`) is read in
place: each file is looked for in the complete folder first. Reading never moves anything. Several
reads are not one step, so a save in between can give files of two generations; the digests in the
manifest tell, and `AdapterFolder.generation` tells whether to read again.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import attrs

from peftstate._disk import is_there, read_file
from peftstate._hub import HubRepo
from peftstate._names import safe_name
from peftstate._storage import (
    ADAPTER_CONFIG_NAME,
    COMPLETE_NAME,
    MANIFEST_NAME,
    REMOVED_PREFIX,
    RESERVED_PREFIX,
    SIDECAR_NAME,
    SIGNATURE_NAME,
    WEIGHTS_NAMES,
    pending,
    removal_mark,
)
from peftstate.errors import ManifestNotFoundError

if TYPE_CHECKING:
    from peftstate._keys import TrustedById
    from peftstate._signature import Signed

HUB_PATTERNS = (
    ADAPTER_CONFIG_NAME,
    *WEIGHTS_NAMES,
    MANIFEST_NAME,
    SIDECAR_NAME,
    SIGNATURE_NAME,
    "peftstate.rank-*.tensors",
)
"""What is downloaded of a folder on the Hub; repos may hold a whole base model beside it."""

_SHARED_BLOBS_MARK = ".huggingface-shared-blobs"
"""In the folder of the Hub's cache with the blobs that several repos share
(`huggingface_hub/utils/_shared_blobs.py`), to which those in the repos' folders are links."""

Stamp = tuple[int, int, int]


@attrs.frozen(kw_only=True)
class AdapterFolder:
    """A folder with an adapter in it, read as the generation that was committed last.

    Attributes:
        path: The folder. It may not exist as such while its first save is being committed.
        root: The folder that was opened: this one, or the one that this is a sub-folder of.
        trusted: The keys one of which must have signed what is read, by their ids; `None` if none.
        signed: What was signed, to which each file is held; with `trusted`, nothing but the
            signature can be read without it.
        repo: The repo at the commit that this is a folder of, if it was opened by the repo's id.
    """

    path: Path
    root: Path
    trusted: TrustedById | None = None
    signed: Signed | None = None
    repo: HubRepo | None = None

    @classmethod
    def at(cls, path: Path) -> AdapterFolder:
        """The adapter folder at a path, links resolved; that it exists is not checked."""
        real = Path(os.path.realpath(path))
        return cls(path=real, root=real)

    def subfolder(self, name: str) -> AdapterFolder:
        """The folder of an extra adapter below this one.

        Raises:
            ValueError: The name is not safe.
        """
        signed = self.signed and self.signed.below(name)
        return attrs.evolve(self, path=self.path / safe_name(name), signed=signed)

    @property
    def commit(self) -> str | None:
        """The commit, when this is a folder of the Hub's cache."""
        snapshot = self._snapshot()
        return None if snapshot is None else snapshot.name

    def fetch(self, *, subfolders: Collection[str] = (), names: Collection[str] = ()) -> None:
        """Download more of the same commit, if this is a folder on the Hub.

        Args:
            subfolders: Folders below this one that hold further adapters.
            names: Other files.

        Raises:
            HfHubHTTPError: The Hub refused.
            AdapterNotFoundError: The Hub is not to be reached and the cache lacks files.
        """
        snapshot = self._snapshot()
        if self.repo is None or snapshot is None or not (subfolders or names):
            return
        own = self.path.relative_to(snapshot).as_posix().removeprefix(".")
        patterns = _patterns(own, (*HUB_PATTERNS, *map(glob.escape, names)))
        for subfolder in subfolders:
            patterns += _patterns(f"{own}/{subfolder}", HUB_PATTERNS)
        self.repo.download(patterns)

    @property
    def is_pending(self) -> bool:
        """Whether files are read from a complete folder, so that `path` itself is a mixture."""
        return len(self._layers()) > 1

    def generation(self) -> tuple[Stamp | None, ...]:
        """A value that changes when a save is committed or moves files.

        Take it before the files are read, and again when they do not fit or one is missing: another
        value means that a save came between, and that they are to be read again.
        """
        watched = (self.path / MANIFEST_NAME, self.path / COMPLETE_NAME, self._above())
        return tuple(_stamp(path) for path in watched)

    def names(self) -> tuple[str, ...]:
        """The names of the files in the folder itself, sorted, without traces of saves."""
        names: set[str] = set()
        removed: set[str] = set()
        for layer in self._layers():
            files: set[str] = set()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                files.update(entry.name for entry in layer.iterdir() if entry.is_file())
            marks = {name for name in files if name.startswith(REMOVED_PREFIX)}
            names |= {name for name in files - removed if not name.startswith(RESERVED_PREFIX)}
            removed |= {name.removeprefix(REMOVED_PREFIX) for name in marks}
        return tuple(sorted(names))

    def exists(self, name: str) -> bool:
        """Whether there is anything of that name, in the folder or one sub-folder down.

        It need not be a file that can be read; who reads it is told.

        Raises:
            ValueError: The name is not safe.
        """
        folder, leaf = self._split(name)
        for layer in folder._layers():
            if is_there(layer / leaf):
                return True
            if os.path.lexists(removal_mark(layer / leaf)):
                return False
        return False

    def read_bytes(self, name: str, *, limit: int | None = None) -> bytes:
        """Read a small file as `read` does."""
        return bytes(self.read(name, limit=limit))

    def read(self, name: str, *, limit: int | None = None, size: int | None = None) -> memoryview:
        """Read a file, once, so that what is checked is what is used.

        Args:
            name: The file, in the folder or one sub-folder down.
            limit: The most bytes that it may have.
            size: The bytes that it must have.

        Raises:
            ValueError: The name is not safe.
            ManifestNotFoundError: The file is the manifest, and there is none.
            FileNotFoundError: There is no such file.
            IntegrityError: It is not a regular file of this folder, of another size, or it cannot
                be read.
            SignatureError: It is not as it was signed.
        """
        folder, leaf = self._split(name)
        roots = folder._link_roots()
        for layer in folder._layers():
            try:
                data = read_file(layer / leaf, inside=roots, limit=limit, size=size)
            except FileNotFoundError:
                if os.path.lexists(removal_mark(layer / leaf)):
                    break
            else:
                self._hold_to_signature(name, data)
                return data
        missing = str(folder.path / leaf)
        if leaf == MANIFEST_NAME:
            raise ManifestNotFoundError(missing)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), missing)

    def _hold_to_signature(self, name: str, data: memoryview) -> None:
        """Refuse a file that is not as it was signed, if it must be."""
        if self.signed is not None:
            self.signed.check(str(self.path / name), name, data)
        elif self.trusted is not None and name != SIGNATURE_NAME:
            raise AssertionError(f"{name} is read before the signature")

    def _split(self, name: str) -> tuple[AdapterFolder, str]:
        """The folder that a file lies in, and the file's name there."""
        path = PurePosixPath(safe_name(name))
        return AdapterFolder(path=self.path / path.parent, root=self.root), path.name

    def _layers(self) -> list[Path]:
        """Where files are looked for, in order: what a save holds back comes first."""
        layers = [self.path]
        if pending(self.path.parent) and (self._above() / self.path.name).is_dir():
            layers.insert(0, self._above() / self.path.name)
        if pending(self.path):
            layers.insert(0, self.path / COMPLETE_NAME)
        return layers

    def _above(self) -> Path:
        """Where files wait for this folder when it was saved as a sub-folder."""
        return self.path.parent / COMPLETE_NAME

    def _link_roots(self) -> list[Path]:
        """Where files may be and links may lead: here, or among the blobs of the Hub's cache."""
        roots = [self.root, self._above()]
        snapshot = self._snapshot()
        if snapshot is not None:
            repo = snapshot.parent.parent
            roots.append(repo / "blobs")
            if (repo.parent / "blobs" / _SHARED_BLOBS_MARK).is_file():
                roots.append(repo.parent / "blobs")
        return roots

    def _snapshot(self) -> Path | None:
        """The snapshot folder of the Hub's cache that this is, or lies in."""
        for path in (self.path, *self.path.parents):
            if path.parent.name == "snapshots" and (path.parent.parent / "blobs").is_dir():
                return path
        return None


def _stamp(path: Path) -> Stamp | None:
    """What changes when a path gets another file, or a folder other entries."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def open_folder(
    model_id: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    patterns: Collection[str] = HUB_PATTERNS,
) -> AdapterFolder:
    """Open an adapter folder given as PEFT's `from_pretrained` is given it.

    Of a repo on the Hub the adapter's files are downloaded, all of one commit; what the repo does
    not hold is absent from the folder. `AdapterFolder.fetch` gets those of further adapters.

    Args:
        model_id: A local folder, or else the id of a repo on the Hub.
        subfolder: The folder below it that holds the adapter.
        revision: Branch, tag or commit on the Hub.
        cache_dir: The Hub's cache, when it is not the usual one.
        token: Access token for the Hub.
        local_files_only: Whether to take only what the cache holds.
        force_download: Whether to download what the cache holds already.
        patterns: What of the adapter's files is to be downloaded.

    Raises:
        HfHubHTTPError: The Hub refused, as it does for a repo that does not exist.
        AdapterNotFoundError: There is no such folder, the cache does not hold such a repo, and the
            Hub is not to be reached.
    """
    local = AdapterFolder.at(Path(model_id, subfolder or ""))
    # Path.is_dir raises where it may not look.
    if os.path.isdir(model_id) or local.exists(ADAPTER_CONFIG_NAME):  # noqa: PTH112
        return local

    repo = HubRepo(
        name=os.fspath(model_id),
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    wanted = _patterns(subfolder or "", patterns)
    snapshot = repo.download(wanted, force_download=force_download)
    if snapshot is None:
        return local  # no repo has such a name, so it was meant as a path; all files are absent
    folder = AdapterFolder.at(snapshot / (subfolder or ""))
    return attrs.evolve(folder, repo=attrs.evolve(repo, revision=folder.commit))


def _patterns(subfolder: str, patterns: Collection[str]) -> list[str]:
    """What to ask the Hub for of a sub-folder; the root is called ``""``."""
    prefix = f"{glob.escape(subfolder.strip('/'))}/" if subfolder.strip("/") else ""
    return [prefix + pattern for pattern in patterns]
