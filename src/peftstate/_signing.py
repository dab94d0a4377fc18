"""Signing a folder that is there, and verifying one, without a model and without torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from peftstate._diff import printable
from peftstate._digest import file_digest
from peftstate._envelope import signature_file
from peftstate._files import consistently, manifest_of
from peftstate._folder import AdapterFolder
from peftstate._keys import UnusableKeyError, key_id, signing_key
from peftstate._signature import (
    NOT_COVERED,
    TEMPLATES_FOLDER,
    check_all,
    covered,
    key_of,
    open_for_load,
)
from peftstate._storage import (
    MANIFEST_NAME,
    RESERVED_PREFIX,
    SIGNATURE_NAME,
    removal_mark,
    staged,
    write_file,
)
from peftstate._verifying import verify_files
from peftstate._warn import warn
from peftstate.errors import ManifestNotFoundError, UnverifiedWarning

if TYPE_CHECKING:
    from peftstate._keys import PrivateKey, SigningKey, TrustedKeys
    from peftstate.manifest import Manifest

_IGNORED = frozenset({*NOT_COVERED, ".cache", ".git", ".github"})
"""What other verifiers are told to pass over: also the folders of git and of the Hub's client."""


def sign(path: str | os.PathLike[str], key: SigningKey) -> str:
    """Sign all files of an adapter's folder, and of the adapters in its sub-folders.

    Whoever signs answers for what lies in the folder, tokenizer and code included. The files of the
    adapter are compared with the manifest before.

    Args:
        path: The folder, which has a manifest.
        key: The private key: the path of a PEM file, the bytes of one, or a key of `cryptography`.

    Returns:
        The id of the key.

    Raises:
        ManifestError: There is no manifest, or it cannot be used.
        IntegrityError: A file is not the one that was saved.
        AdapterMismatchError: A PEFT config is not the one that was saved.
        ValueError: The key cannot be used, or a file has a name that is not safe everywhere.
        OSError: The key cannot be read, or the signature cannot be written.
        ImportError: The package `cryptography` is missing.
    """
    private = signing_key(key)
    folder = AdapterFolder.at(Path(path))
    if not folder.exists(MANIFEST_NAME):
        raise ManifestNotFoundError(str(folder.path / MANIFEST_NAME))
    verify_files(path).raise_for_mismatch()
    with staged(folder.path) as staging:
        signatures = consistently(folder, lambda opened: _signatures(opened, private))
        for name, data in signatures.items():
            write_file(staging / name, data)
    return key_id(private.public_key())


def verify_signature(path: str | os.PathLike[str], trusted_keys: TrustedKeys, **hub: Any) -> str:
    """Verify that an adapter's folder is, file by file, as the owner of a trusted key signed it.

    Args:
        path: The adapter's folder, or the id of a repo on the Hub.
        trusted_keys: The public keys: each the path of a PEM file, the bytes of one, or a key of
            `cryptography`.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Returns:
        The id of the key that signed.

    Raises:
        SignatureError: It is not signed with a trusted key, or a file differs, is missing or is not
            covered.
        IntegrityError: A file cannot be read.
        ValueError: A key cannot be used.
        OSError: A key cannot be read.
        ImportError: The package `cryptography` is missing.
    """

    def read(opened: AdapterFolder) -> str:
        check_all(opened)
        return key_of(opened)

    return consistently(open_for_load(path, trusted_keys=trusted_keys, **hub), read)


def signature_of(
    folder: AdapterFolder, subfolders: Collection[str], key: PrivateKey, *, at: Path
) -> bytes:
    """Sign a folder as it is.

    Args:
        folder: The folder, be it one that is still being written.
        subfolders: The folders in it of the adapters that its manifest describes.
        key: The key.
        at: Where the folder is, or will be.

    Returns:
        The content of its signature file.
    """
    files = {name: file_digest(folder.read(name)) for name in sorted(covered(folder, subfolders))}
    inside = {TEMPLATES_FOLDER, *subfolders}
    ignored = {f"{subfolder}/{name}" for subfolder in subfolders for name in NOT_COVERED}
    with contextlib.suppress(FileNotFoundError):
        others = {entry.name for entry in at.iterdir() if entry.is_dir()} - inside
        ignored |= {_text(name) for name in others if not name.startswith(RESERVED_PREFIX)}
    name = _text(at.resolve().name)
    return signature_file(files, key, name=name, ignored=_IGNORED | ignored)


def _text(name: str) -> str:
    """A name on disk as text, whatever bytes it is of."""
    return name.encode(errors="replace").decode()


def key_to_save_with(source: SigningKey) -> PrivateKey:
    """Load the key that a save is to sign with.

    Raises:
        UnusableKeyError: It cannot be read, is of another kind, or cannot be used here.
    """
    try:
        return signing_key(source)
    except (OSError, ImportError) as error:
        raise UnusableKeyError(str(error)) from error


def sign_staged(
    staging: Path, directory: Path, manifests: Mapping[str, Manifest], key: PrivateKey
) -> None:
    """Sign what a save has written, and nothing that lay in the folder before.

    Args:
        staging: Where it was written.
        directory: Where it will be moved.
        manifests: The manifests that were written, by the folder that each is in.
        key: The key.
    """
    for folder, manifest in manifests.items():
        subfolders = _parents(manifest)
        written = AdapterFolder.at(staging / folder)
        at = directory if folder == "." else directory / folder
        _warn_of_others(written, AdapterFolder.at(at), subfolders)
        write_file(staging / folder / SIGNATURE_NAME, signature_of(written, subfolders, key, at=at))


def _warn_of_others(
    written: AdapterFolder, old: AdapterFolder, subfolders: Collection[str]
) -> None:
    """Say which files a save leaves in the folder that it has not written, and so does not sign."""
    others = covered(old, subfolders) - covered(written, subfolders)
    left = sorted(name for name in others if not os.path.lexists(removal_mark(written.path / name)))
    if left:
        warn(
            f"{old.path} holds files that this save has not written, so they are not signed: "
            f"{', '.join(map(printable, left))}. With trusted_keys the folder is refused until you "
            "remove them, or sign them, too, with peftstate.sign(path, key).",
            UnverifiedWarning,
        )


def _parents(manifest: Manifest) -> set[str]:
    """The sub-folders that a manifest's files are in."""
    return {str(PurePosixPath(name).parent) for name in manifest.files} - {"."}


def _signatures(folder: AdapterFolder, key: PrivateKey) -> dict[str, bytes]:
    """The signature files of a folder and of the adapters in its sub-folders."""
    subfolders = _parents(manifest_of(folder))
    found = {SIGNATURE_NAME: signature_of(folder, subfolders, key, at=folder.path)}
    for name in sorted(subfolders):
        inner = folder.subfolder(name)
        if inner.exists(MANIFEST_NAME):
            found[f"{name}/{SIGNATURE_NAME}"] = signature_of(inner, (), key, at=inner.path)
    return found
