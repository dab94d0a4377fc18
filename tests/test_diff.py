"""What differs between two JSON values, field by field."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftstate._diff import ABSENT, PRESENT, Mismatch, diff, join, step, steps
from tests._records import NAMES, SCALARS, VALUES

DIGEST = "0123456789ab" + "c" * 52


@pytest.mark.parametrize(
    ("saved", "found", "expected"),
    [
        (1, 2, [("", 1, 2)]),
        ({"a": 1}, {"a": 2}, [("a", 1, 2)]),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, [("a.b.c", 1, 2)]),
        ({"a": 1}, {}, [("a", 1, ABSENT)]),
        ({}, {"a": 1}, [("a", ABSENT, 1)]),
        ({"a": None}, {}, [("a", None, ABSENT)]),
        ({"a": {}}, {}, [("a", {}, ABSENT)]),
        ({"a": {"b": 1}}, {"a": 1}, [("a", {"b": 1}, 1)]),
        ({"a": {}}, {"a": []}, [("a", {}, [])]),
        ({"b": 1, "a": 1}, {"a": 2, "b": 2}, [("a", 1, 2), ("b", 1, 2)]),
        ({"t": {"a.b": 1}}, {"t": {"a.b": 2}}, [("t[a.b]", 1, 2)]),
        ({"a.b": {"c": 1}}, {"a.b": {"c": 2}}, [("[a.b].c", 1, 2)]),
        ({"t": {"": 1}}, {"t": {"": 2}}, [("t[]", 1, 2)]),
        ({"t": {"0": 1}}, {"t": {"0": 2}}, [("t[0]", 1, 2)]),
    ],
)
def test_diff(saved: Any, found: Any, expected: list[tuple[str, Any, Any]]) -> None:
    """Each leaf that differs is one mismatch, in the order of the keys, under its path."""
    mismatches = diff("section", saved, found)
    assert mismatches == tuple(Mismatch("section", *fields) for fields in expected)


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        (True, 1),
        (False, 0),
        (1, 1.0),
        (0.0, 0),
        (None, False),
        (None, 0),
        ("", None),
        ("1", 1),
        ([], {}),
        ([1], [True]),
        ([1, [2]], [1, [2.0]]),
        ([{"a": 1}], [{"a": True}]),
        ([{"a": 1}], [{"b": 1}]),
        ([1], [1, 2]),
        ([1, 2], [2, 1]),
        (["a", "b"], ["b", "a"]),
        (["a", "a"], ["a"]),
        (["ab"], "ab"),
    ],
)
def test_types_differ(saved: Any, found: Any) -> None:
    """What Python may call equal, but the manifest writes in another way, differs as a whole."""
    for first, second in ((saved, found), (found, saved)):
        assert diff("s", {"a": first}, {"a": second}) == (Mismatch("s", "a", first, second),)


def test_lists_and_tuples() -> None:
    """A record's tuple and the list that JSON makes of it are the same."""
    assert diff("s", {"a": (1, (2.0, "x"))}, {"a": [1, [2.0, "x"]]}) == ()
    assert diff("s", {"a": ("x", "y")}, {"a": ["x", "y"]}) == ()


def test_names() -> None:
    """Of two lists of different names, each name that only one of them has is a mismatch."""
    saved, found = {"names": ["c", "a", "b"]}, {"names": ["b", "d.e", "c"]}
    assert diff("s", saved, found) == (
        Mismatch("s", "names[a]", PRESENT, ABSENT),
        Mismatch("s", "names[d.e]", ABSENT, PRESENT),
    )
    assert diff("s", {"names": []}, {"names": ["a"]}) == (
        Mismatch("s", "names[a]", ABSENT, PRESENT),
    )


def test_path() -> None:
    """A mismatch's path begins with its section."""
    assert Mismatch("dtype", "base.default", "float32", "bfloat16").path == "dtype.base.default"
    assert Mismatch("files", "[a.json].size", 1, 2).path == "files[a.json].size"
    assert Mismatch("rng", "", 1, 2).path == "rng"


@pytest.mark.parametrize(
    ("path", "key", "expected"),
    [
        ("", "", ""),
        ("", "a", "a"),
        ("a", "", "a"),
        ("a", "b", "a.b"),
        ("a", "[0]", "a[0]"),
        ("", "[x.y]", "[x.y]"),
        ("a[0]", "b", "a[0].b"),
    ],
)
def test_join(path: str, key: str, expected: str) -> None:
    """Steps are joined by dots, but for those in brackets."""
    assert join(path, key) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("name", "name"),
        ("_name", "_name"),
        ("größe", "größe"),
        ("a.b", "[a.b]"),
        ("a-b", "[a-b]"),
        ("0", "[0]"),
        ("", "[]"),
        (3, "[3]"),
    ],
)
def test_step(key: str | int, expected: str) -> None:
    """What is no identifier stands in brackets."""
    assert step(key) == expected


@given(st.lists(st.from_regex(r"[^\[\]]+", fullmatch=True), max_size=4))
@settings(deadline=None)
def test_steps(keys: list[str]) -> None:
    """The steps of a path are the keys that it was joined of."""
    path = ""
    for key in keys:
        path = join(path, step(key))
    assert steps(path) == keys


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("float32", "'float32'"),
        (None, "None"),
        (1.5, "1.5"),
        (ABSENT, "absent"),
        (PRESENT, "present"),
        (DIGEST, "0123456789ab…"),
        (DIGEST.upper(), repr(DIGEST.upper())),
        ({"b": [1, {}], "a": ABSENT}, "{'a': absent, 'b': [1, {}]}"),
        ({"digest": DIGEST}, "{'digest': 0123456789ab…}"),
        ([["x" * 60] * 3], "[['" + "x" * 60 + "', '" + "x" * 52 + "…"),
        ("x" * 200, "'" + "x" * 37 + "..." + "x" * 38 + "'"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        ([[[[1]]]], "[[[[...]]]]"),
    ],
)
def test_text(value: Any, text: str) -> None:
    """A mismatch says where, what was saved and what was found, in a line of bearable length."""
    assert str(Mismatch("s", "a", value, 0)) == f"s.a: saved {text}, found 0"
    assert str(Mismatch("s", "a", 0, value)) == f"s.a: saved 0, found {text}"


def test_pickle() -> None:
    """A mismatch goes through a pickle, and what is absent stays the one `ABSENT`."""
    mismatch = Mismatch("s", "a", {"x": [1]}, ABSENT)
    again = pickle.loads(pickle.dumps(mismatch))  # noqa: S301
    assert again == mismatch
    assert again.found is ABSENT


@given(VALUES)
@settings(deadline=None)
def test_same(value: Any) -> None:
    """A value does not differ from itself, nor from a copy."""
    assert diff("s", value, value) == ()
    assert diff("s", value, copy.deepcopy(value)) == ()


TREES = st.recursive(
    st.lists(SCALARS, max_size=3).filter(lambda items: not all(type(i) is str for i in items))
    | SCALARS,
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=8,
)
"""Values of which each scalar and each list is one leaf."""


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each leaf."""
    if not isinstance(value, dict):
        yield path
        return
    for key, inner in value.items():
        yield from _leaves(inner, (*path, key))


@given(st.data())
@settings(deadline=None)
def test_one_leaf(data: st.DataObject) -> None:
    """A leaf that is changed is the only mismatch, and the mismatch names it."""
    saved = {"root": data.draw(TREES)}
    keys = data.draw(st.sampled_from(list(_leaves(saved))))
    found: dict[str, Any] = copy.deepcopy(saved)
    parent = found
    for key in keys[:-1]:
        parent = parent[key]
    old, new = parent[keys[-1]], data.draw(st.sampled_from([{}, "another value", [None, 0.25]]))
    parent[keys[-1]] = ["really", 1] if new == old else new
    path = ""
    for key in keys:
        path = join(path, step(key))
    assert diff("s", saved, found) == (Mismatch("s", path, old, parent[keys[-1]]),)


def test_steps_of_a_hostile_path() -> None:
    """A path of a million brackets is taken apart in one go."""
    assert steps("[" * 1_000_000) == ["[" * 999_999]


def test_many_names() -> None:
    """Lists of very many names are compared by what is in them, not each with each."""
    names = [str(number) for number in range(100_000)]
    mismatches = diff("training", names, names[:1])
    assert len(mismatches) == 99_999
    assert mismatches[0] == Mismatch("training", "[1]", PRESENT, ABSENT)


def test_message_is_printable() -> None:
    """A key cannot clear the screen of who reads the message, or start a line of its own."""
    mismatch = Mismatch("rng", join("", step("a\x1b[2J\nok")), 1, 2)
    assert str(mismatch) == r"rng[a\x1b[2J\nok]: saved 1, found 2"
