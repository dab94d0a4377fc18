"""Checking the names of files and sub-folders that a manifest gives, before they meet a disk."""

from __future__ import annotations

import ntpath
import re
import unicodedata
from collections.abc import Callable

from peftstate._storage import RESERVED_PREFIX

_DEVICE = re.compile(r"(con|prn|aux|nul|con(in|out)\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""The Unicode categories of control characters, surrogates and separators of lines."""

_FAULTS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda part: part == "", "has an empty part, or is absolute"),
    (lambda part: part in {".", ".."}, "has a part that is '.' or '..'"),
    (lambda part: "\\" in part, "has a backslash"),
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
        raise ValueError(f"{name!r} has more than two parts")
    for part in name.split("/"):
        for is_faulty, fault in _FAULTS:
            if is_faulty(part):
                raise ValueError(f"{name!r} {fault}")
    return name
