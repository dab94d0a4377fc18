"""Checking the names of files and sub-folders that a manifest gives, before they meet a disk."""

from __future__ import annotations

import ntpath
import re
import unicodedata
from collections.abc import Callable, Iterable

from peftstate._storage import RESERVED_PREFIX

_DEVICE = re.compile(r"(con|prn|aux|nul|con(in|out)\$|(com|lpt)[0-9¹²³]) *([.:].*)?", re.IGNORECASE)
_LONGEST = 255
"""Bytes of UTF-8 that a part of a name may have, as on most file systems."""
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""The Unicode categories of control characters, surrogates and separators of lines."""

_FAULTS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda part: part == "", "has an empty part, or is absolute"),
    (lambda part: part in {".", ".."}, "has a part that is '.' or '..'"),
    (lambda part: "\\" in part, "has a backslash"),
    (lambda part: len(part.encode("utf-8", "replace")) > _LONGEST, "has a part that is too long"),
    (lambda part: ntpath.splitdrive(part)[0] != "", "names a drive"),
    (lambda part: any(unicodedata.category(c) in _HIDDEN for c in part), "has a control character"),
    (lambda part: part[-1] in ". ", "has a part that ends in a dot or a space"),
    (lambda part: _DEVICE.fullmatch(part) is not None, "is the name of a device on Windows"),
    (lambda part: unicodedata.normalize("NFC", part) != part, "is not in Unicode's form NFC"),
    (lambda part: part.startswith(RESERVED_PREFIX), "is kept for saves in progress"),
)


def safe_name(name: str) -> str:
    """Check a name that a manifest gives.

    It must mean one and the same file below the adapter folder on every system.

    Args:
        name: One component, or two joined by ``/``.

    Returns:
        The name, unchanged.

    Raises:
        ValueError: The name is not safe; the text says why.
    """
    if name.count("/") > 1:
        raise ValueError(f"{_short(name)} has more than two parts")
    for part in name.split("/"):
        for is_faulty, fault in _FAULTS:
            if is_faulty(part):
                raise ValueError(f"{_short(name)} {fault}")
    return name


def check_twins(names: Iterable[str]) -> None:
    """Refuse names that mean the same file where the case of letters is no difference.

    Raises:
        ValueError: Two of them do; the text says which.
    """
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(unicodedata.normalize("NFC", name.casefold()), name)
        if twin != name:
            raise ValueError(f"{twin!r} and {name!r} are the same name on some systems")


def _short(name: str) -> str:
    """A name for a message, in quotes."""
    return repr(name if len(name) <= _LONGEST else name[:80] + "…")


def in_folder(folder: str, name: str) -> str:
    """The name of a file in an adapter's folder, which is ``"."`` for the manifest's own."""
    return name if folder == "." else f"{folder}/{name}"
