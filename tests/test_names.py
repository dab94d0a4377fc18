"""The names that a manifest may give."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftstate._names import check_twins, safe_name


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "extra/adapter_config.json",
        "README.md",
        ".gitattributes",
        "..hidden",
        "a b",
        "lora:v1",
        "grüße/重み.bin",
        "console",
        "com10",
        "auxiliary.json",
        "peftstate.rank-00001-of-00008.tensors",
    ],
)
def test_safe_names(name: str) -> None:
    """Names that PEFT and people give are taken as they are."""
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "has an empty part, or is absolute"),
        ("/", "has an empty part, or is absolute"),
        ("/etc", "has an empty part, or is absolute"),
        ("a/", "has an empty part, or is absolute"),
        ("/etc/passwd", "has more than two parts"),
        ("a/b/c", "has more than two parts"),
        ("//server", "has more than two parts"),
        (".", "has a part that is '.' or '..'"),
        ("..", "has a part that is '.' or '..'"),
        ("../a", "has a part that is '.' or '..'"),
        ("a/..", "has a part that is '.' or '..'"),
        ("..\\a", "has a backslash"),
        ("\\\\server\\share", "has a backslash"),
        ("C:", "names a drive"),
        ("c:a", "names a drive"),
        ("a/c:b", "names a drive"),
        ("a\0b", "has a control character"),
        ("a\n", "has a control character"),
        ("a\x7f", "has a control character"),
        ("a\x85b", "has a control character"),
        ("a\u2028b", "has a control character"),
        ("a\ud800", "has a control character"),
        ("a.", "has a part that ends in a dot or a space"),
        ("a /b", "has a part that ends in a dot or a space"),
        ("...", "has a part that ends in a dot or a space"),
        ("con", "is the name of a device on Windows"),
        ("NUL.txt", "is the name of a device on Windows"),
        ("nul .tar.gz", "is the name of a device on Windows"),
        ("a/COM1", "is the name of a device on Windows"),
        ("LPT².bin", "is the name of a device on Windows"),
        ("con:", "is the name of a device on Windows"),
        ("aux:stream", "is the name of a device on Windows"),
        ("a" * 256, "has a part that is too long"),
        ("ü" * 128 + "/b", "has a part that is too long"),
        ("conin$", "is the name of a device on Windows"),
        ("aux/file", "is the name of a device on Windows"),
        ("gru\u0308n", "is not in Unicode's form NFC"),
        (".peftstate-complete", "is kept for saves in progress"),
        (".peftstate-complete/adapter_config.json", "is kept for saves in progress"),
    ],
)
def test_unsafe_names(name: str, fault: str) -> None:
    """A name that means another file, or none, somewhere is refused with the reason."""
    shown = name if len(name) < 256 else name[:80] + "…"
    with pytest.raises(ValueError, match=re.escape(f"{shown!r} {fault}")):
        safe_name(name)


@pytest.mark.parametrize("names", [(), ("a", "b"), ("a/x", "a/y", "x"), ("ß", "s"), ("a", "a")])
def test_no_twins(names: tuple[str, ...]) -> None:
    """Different names are different files."""
    check_twins(names)


@pytest.mark.parametrize(
    ("one", "other"), [("A", "a"), ("x/Ref", "x/ref"), ("Straße", "STRASSE"), ("ü", "u\u0308")]
)
def test_twins(one: str, other: str) -> None:
    """Names that are one file on macOS or Windows are refused."""
    message = re.escape(f"{one!r} and {other!r} are the same name on some systems")
    with pytest.raises(ValueError, match=message):
        check_twins(["z", one, other])


@given(st.lists(st.sampled_from([*"ab./\\: \0", "..", "C:", "con", "ü"]), max_size=8).map("".join))
def test_safe_names_stay_below(name: str) -> None:
    """Whatever is taken stays below the folder, on POSIX and on Windows."""
    try:
        safe_name(name)
    except ValueError:
        return
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        assert not path.anchor
        assert not path.drive
        assert ".." not in path.parts
        assert 1 <= len(path.parts) <= 2
        assert path.as_posix() == name
