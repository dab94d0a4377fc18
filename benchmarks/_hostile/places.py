"""Names that a manifest gives, and what lies in the places of files."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._hostile.case import (
    CONFIG,
    MANIFEST,
    SIDECAR,
    WEIGHTS,
    Case,
    edited,
    section,
)
from peftstate.errors import IntegrityError, ManifestDecodeError, PeftStateError

_FILE = {"size": 0, "sha256": "0" * 64}
_NAMES = {
    "parent": "../evil.bin",
    "parent below": "ref/..",
    "absolute": "/etc/passwd",
    "home": "//evil",
    "backslash": "..\\evil.bin",
    "drive": "C:evil.bin",
    "UNC": "\\\\server\\share",
    "NUL byte": "evil.bin\0.txt",
    "newline": "evil\n.bin",
    "right to left": "\u2028evil",
    "device": "NUL",
    "device with an ending": "aux.tensors",
    "device with a stream": "con:evil",
    "trailing dot": "peftstate.tensors.",
    "trailing space": "peftstate.tensors ",
    "three parts": "a/b/c",
    "empty": "",
    "itself": ".",
    "too long": "a" * 300,
    "not NFC": "gru\u0308n.bin",
    "of a save": ".peftstate-complete/peftstate.json",
}


def _listed(name: str) -> Callable[[Path], object]:
    """A file in the manifest's list."""
    return edited(lambda value: value["files"].update({name: _FILE}))


def _in(folder: str) -> Callable[[Path], object]:
    """The folder of a second adapter."""

    def edit(record: dict[str, Any]) -> None:
        record["adapters"]["second"] = {**record["adapters"]["default"], "folder": folder}

    return section("adapters", edit)


def _link(name: str, target: str) -> Callable[[Path], object]:
    """A link in the place of a file."""

    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return make


def _moved_out(name: str) -> Callable[[Path], object]:
    """A file that lies outside of the folder, and a link to it, by which nothing would change."""

    def make(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return make


def _fake_cache(folder: Path) -> None:
    """Links that lead out by a folder that looks like the Hub's cache but is a link itself."""
    (folder / "blobs").symlink_to(folder.parent)
    shutil.move(folder / SIDECAR, folder.parent / "outside-blob")
    (folder / SIDECAR).symlink_to("blobs/outside-blob")


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of a file."""

    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


def _socket(path: Path) -> None:
    """A socket, made where its path is short."""
    before = Path.cwd()
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def _twin(folder: Path) -> None:
    """Names that are one file on macOS and Windows."""
    edited(lambda value: value["files"].update({SIDECAR.upper(): _FILE}))(folder)


CASES = (
    *(
        Case(
            name=f"a file's name: {kind}",
            attacks="a path out of the folder, or another file on another system",
            make=_listed(name),
            error=ManifestDecodeError,
            tells="files[",
        )
        for kind, name in _NAMES.items()
    ),
    *(
        Case(
            name=f"an adapter's folder: {kind}",
            attacks="a path out of the folder",
            make=_in(name),
            error=ManifestDecodeError,
            tells="sections.adapters.adapters",
        )
        for kind, name in {
            "parent": "..",
            "absolute": "/etc",
            "backslash": "..\\x",
            "two levels": "a/b",
            "the manifest's own": ".",
            "empty": "",
        }.items()
    ),
    Case(
        name="names that differ in case",
        attacks="two names of one file",
        make=_twin,
        error=ManifestDecodeError,
        tells="files: 'PEFTSTATE.TENSORS' and 'peftstate.tensors' are the same name",
    ),
    *(
        Case(
            name=f"{name} is a link to /etc/passwd",
            attacks="a file of the system",
            make=_link(name, "/etc/passwd"),
            error=IntegrityError,
            tells=f"{name}: saved a file of this folder, found a link to",
        )
        for name in (MANIFEST, SIDECAR, WEIGHTS, CONFIG)
    ),
    *(
        Case(
            name=f"{name} lies outside",
            attacks="a file that changes between check and use",
            make=_moved_out(name),
            error=IntegrityError,
            tells=f"{name}: saved a file of this folder, found a link to",
        )
        for name in (MANIFEST, SIDECAR, WEIGHTS, CONFIG)
    ),
    Case(
        name="a false cache",
        attacks="the exception for links of the Hub's cache",
        make=_fake_cache,
        error=IntegrityError,
        tells="found a link to",
    ),
    Case(
        name="a link to itself",
        attacks="a reader that follows it",
        make=_link(SIDECAR, SIDECAR),
        error=IntegrityError,
        tells=SIDECAR,
    ),
    *(
        Case(
            name=f"{name} is a pipe",
            attacks="a reader that waits",
            make=_instead(name, os.mkfifo),
            error=IntegrityError,
            tells=f"{name}: saved a file, found prw",
        )
        for name in (MANIFEST, SIDECAR, WEIGHTS, CONFIG)
    ),
    Case(
        name="a socket",
        attacks="a reader that waits",
        make=_instead(SIDECAR, _socket),
        error=IntegrityError,
        tells="found a socket",
    ),
    Case(
        name="a device",
        attacks="a reader without end",
        make=_link(SIDECAR, "/dev/zero"),
        error=IntegrityError,
        tells="found a link to /dev/zero",
    ),
    Case(
        name="a folder",
        attacks="a reader of files",
        make=_instead(SIDECAR, Path.mkdir),
        error=PeftStateError,
        tells=SIDECAR,
    ),
)
