"""Folders that are signed: which files a signature covers, and how a load holds to it.

A load with trusted keys takes no byte from a folder that was not signed by one of them: each file
is checked as it is read, on the bytes that are used. What lies in the folder beside them is checked
as well, since other programs read it from there: a tokenizer, code, weights in another format.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._digest import file_digest
from peftstate._envelope import MAX_BYTES, Statement, verified
from peftstate._folder import AdapterFolder, open_folder
from peftstate._keys import trusted_by_id
from peftstate._storage import MANIFEST_NAME, SIGNATURE_NAME
from peftstate.errors import SignatureError

if TYPE_CHECKING:
    from peftstate._keys import TrustedKeys

TEMPLATES_FOLDER = "additional_chat_templates"
"""The only sub-folder from which a tokenizer is loaded
(`transformers/utils/hub.py::CHAT_TEMPLATE_DIR`)."""

NOT_COVERED = frozenset({SIGNATURE_NAME, "README.md", ".gitattributes", ".gitignore"})
"""Files that are no part of what is signed: no load reads them, and people edit them."""


@attrs.frozen(eq=False)
class Signed:
    """What holds for the files of a folder because of its signature.

    Attributes:
        statement: What was signed.
        prefix: What comes before the names of files, when it is a sub-folder that is read.
        checked: The names of the files that were found to be as signed.
    """

    statement: Statement
    prefix: str = ""
    checked: set[str] = attrs.field(factory=set)

    def below(self, subfolder: str) -> Signed:
        """What holds for a sub-folder."""
        return attrs.evolve(self, prefix=f"{self.prefix}{subfolder}/")

    def check(self, path: str, name: str, data: memoryview) -> None:
        """Refuse a file that is not as it was signed.

        Raises:
            SignatureError: It is another one, or not covered at all.
        """
        name = self.prefix + name
        signed = self.statement.files.get(name)
        if signed is None:
            raise _uncovered(path)
        if (found := file_digest(data)) != signed:
            raise SignatureError(
                path,
                f"the file is not the one that was signed: signed SHA-256 {signed}, found {found}. "
                "Do not load the folder; get it anew from its author.",
            )
        self.checked.add(name)


def open_for_load(
    source: str | os.PathLike[str], *, trusted_keys: TrustedKeys | None = None, **hub: Any
) -> AdapterFolder:
    """Open a folder as `open_folder` does; with trusted keys, to read only what they signed.

    Of a repo on the Hub, all that is signed is downloaded.

    Raises:
        SignatureError: The folder is on the Hub, and was not signed with a trusted key.
    """
    if trusted_keys is None:
        return open_folder(source, **hub)
    keys = trusted_by_id(trusted_keys)
    folder = attrs.evolve(open_folder(source, **hub), trusted=keys)
    if folder.repo is not None:
        folder.fetch(names=_statement(folder).files)
    return folder


def under_signature(folder: AdapterFolder) -> AdapterFolder:
    """The folder, as one that gives only files that are signed, if that was asked for.

    Raises:
        SignatureError: It is not signed with a trusted key.
    """
    if folder.trusted is None:
        return folder
    signed = Signed(_statement(folder))
    if not folder.exists(MANIFEST_NAME):
        raise _missing(str(folder.path / MANIFEST_NAME))
    return attrs.evolve(folder, signed=signed)


def check_all(folder: AdapterFolder, subfolders: Collection[str] | None = None) -> None:
    """Refuse a folder in which any file is not as it was signed, if it is held to a signature.

    Args:
        folder: What `under_signature` gave. Files that were read from it are not read again.
        subfolders: The folders of adapters in which to look, too; by default all that are signed.

    Raises:
        SignatureError: A file is another one, missing, or not covered by the signature.
    """
    if folder.signed is None:
        return
    signed = folder.signed.statement.files
    if subfolders is None:
        subfolders = _parents(signed)
    present = covered(folder, subfolders, also=signed)
    for name in sorted(present - signed.keys()):
        raise _uncovered(str(folder.path / name))
    looked_into = {".", TEMPLATES_FOLDER, *subfolders}
    wanted = {name for name in signed if str(PurePosixPath(name).parent) in looked_into}
    for name in sorted(wanted - folder.signed.checked):
        try:
            folder.read(name)
        except FileNotFoundError:
            raise _missing(str(folder.path / name)) from None


def key_of(folder: AdapterFolder) -> str:
    """The id of the key that signed what `under_signature` gave."""
    if folder.signed is None:
        raise AssertionError("the folder was opened without trusted keys")
    return folder.signed.statement.key


def covered(
    folder: AdapterFolder, subfolders: Collection[str], *, also: Collection[str] = ()
) -> set[str]:
    """The files of a folder that are, or ought to be, covered by its signature.

    Args:
        folder: The folder.
        subfolders: The folders in it of the adapters that its manifest describes.
        also: Files that count even if usually they are not covered.
    """
    names = set(folder.names())
    for subfolder in {TEMPLATES_FOLDER, *subfolders}:
        names |= {f"{subfolder}/{name}" for name in folder.subfolder(subfolder).names()}
    return {name for name in names if name in also or PurePosixPath(name).name not in NOT_COVERED}


def _statement(folder: AdapterFolder) -> Statement:
    """What the signature of a folder says."""
    path = str(folder.path / SIGNATURE_NAME)
    try:
        data = folder.read_bytes(SIGNATURE_NAME, limit=MAX_BYTES)
    except FileNotFoundError:
        raise SignatureError(
            path,
            "there is no signature, and only what a trusted key has signed is to be loaded. "
            "Sign the folder with peftstate.sign(path, key), or load it without trusted_keys.",
        ) from None
    statement = verified(data, folder.trusted or {}, path)
    if MANIFEST_NAME not in statement.files:
        raise SignatureError(
            path,
            "what was signed has no peftstate manifest, so nothing of the model's state could be "
            "verified. Save the model with peftstate, and sign the folder again.",
        )
    return statement


def _parents(names: Iterable[str]) -> set[str]:
    """The sub-folders that files are in."""
    return {str(PurePosixPath(name).parent) for name in names} - {"."}


def _missing(path: str) -> SignatureError:
    """The error for a file that was signed and is not there."""
    return SignatureError(
        path, "the file was signed, and is missing. Get the folder anew from its author."
    )


def _uncovered(path: str) -> SignatureError:
    """The error for a file that nobody has signed."""
    return SignatureError(
        path,
        "the file is not covered by the signature. Remove it, or have the folder signed again if "
        "it belongs there.",
    )
