"""Records to JSON values and back, and JSON that somebody else may have written."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftstate._codec import (
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_KEY,
    MAX_TEXT,
    MAX_VALUES,
    NOT_JSON,
    DecodeError,
    alike,
    canonical,
    decode,
    dumps,
    encode,
    loads,
)
from peftstate._diff import diff
from peftstate.sections import SECTIONS
from peftstate.sections._table import Table
from tests._records import VALUES, records


@attrs.frozen(kw_only=True)
class Inner:
    """A record in a record."""

    number: float
    note: str | None = None


@attrs.frozen(kw_only=True)
class Outer:
    """A record with every kind of field that records have."""

    name: str
    count: int
    flag: bool
    inner: Inner
    maybe: Inner | None
    items: tuple[Inner, ...]
    by_name: Mapping[str, int]
    table: Table[bool]
    anything: Mapping[str, Any]
    beside: Any = attrs.field(default=None, metadata={NOT_JSON: True})


RECORD = Outer(
    name="é",
    count=3,
    flag=True,
    inner=Inner(number=0.5),
    maybe=None,
    items=(Inner(number=1.0, note="a"), Inner(number=2.0)),
    by_name={"a b": 1},
    table=Table(default=True, exceptions={"x": False}),
    anything={"list": [1, None, {"deep": "yes"}]},
)
VALUE: dict[str, Any] = {
    "name": "é",
    "count": 3,
    "flag": True,
    "inner": {"number": 0.5, "note": None},
    "maybe": None,
    "items": [{"number": 1.0, "note": "a"}, {"number": 2.0, "note": None}],
    "by_name": {"a b": 1},
    "table": {"default": True, "exceptions": {"x": False}},
    "anything": {"list": [1, None, {"deep": "yes"}]},
}


def test_encode() -> None:
    """A record becomes JSON field by field; what lives beside the JSON is left out."""
    assert encode(attrs.evolve(RECORD, beside=object())) == VALUE


def test_decode() -> None:
    """The JSON of a record gives the record, its sequences as tuples."""
    assert decode(VALUE, Outer) == RECORD
    assert type(decode(VALUE, Outer).items) is tuple


def test_decode_default() -> None:
    """A key whose field has a default may be missing."""
    assert decode({"number": 1.0}, Inner) == Inner(number=1.0)


TEXT, INTEGER, FLOAT, FLAG = "a string", "an integer", "a float", "a boolean"
OBJECT, ARRAY, NULL = "an object", "an array", "null"


@pytest.mark.parametrize(
    ("key", "value", "field", "expected", "found"),
    [
        ("name", 1, "name", TEXT, INTEGER),
        ("name", None, "name", TEXT, NULL),
        ("name", ["a"], "name", TEXT, ARRAY),
        ("count", True, "count", INTEGER, FLAG),
        ("count", 3.0, "count", INTEGER, FLOAT),
        ("count", "3", "count", INTEGER, TEXT),
        ("flag", 1, "flag", FLAG, INTEGER),
        ("flag", "true", "flag", FLAG, TEXT),
        ("flag", None, "flag", FLAG, NULL),
        ("inner", None, "inner", OBJECT, NULL),
        ("inner", [], "inner", OBJECT, ARRAY),
        ("inner", {"number": 1}, "inner.number", FLOAT, INTEGER),
        ("inner", {"number": True}, "inner.number", FLOAT, FLAG),
        ("inner", {"number": "1.0"}, "inner.number", FLOAT, TEXT),
        ("inner", {"number": 1.0, "note": 1}, "inner.note", TEXT, INTEGER),
        ("maybe", "none", "maybe", OBJECT, TEXT),
        ("items", {}, "items", ARRAY, OBJECT),
        ("items", "ab", "items", ARRAY, TEXT),
        ("items", None, "items", ARRAY, NULL),
        ("items", [{"number": 1.0}, 2], "items[1]", OBJECT, INTEGER),
        ("by_name", [], "by_name", OBJECT, ARRAY),
        ("by_name", {"key": "1"}, "by_name.key", INTEGER, TEXT),
        ("by_name", {"a.b": False}, "by_name[a.b]", INTEGER, FLAG),
        ("by_name", {"0": 1.0}, "by_name[0]", INTEGER, FLOAT),
        ("table", {"default": 1, "exceptions": {}}, "table.default", FLAG, INTEGER),
        ("table", {"default": None, "exceptions": {"x": 0}}, "table.exceptions.x", FLAG, INTEGER),
        ("anything", [], "anything", OBJECT, ARRAY),
    ],
)
def test_decode_type(key: str, value: Any, field: str, expected: str, found: str) -> None:
    """A value is taken in the type that its field names and no other; the error says where."""
    with pytest.raises(DecodeError) as caught:
        decode({**VALUE, key: value}, Outer)
    assert caught.value.field == field
    assert str(caught.value) == f"expected {expected}, found {found}"


@pytest.mark.parametrize(
    ("key", "value", "field", "message"),
    [
        ("inner", {}, "inner.number", "is missing"),
        ("inner", {"number": 1.0, "x": 1}, "inner", "unknown key 'x'"),
        ("inner", {"number": 1.0, "b": 1, "a": 1}, "inner", "unknown key 'a'"),
        ("maybe", {}, "maybe.number", "is missing"),
        ("items", [{"number": 1.0}, {}], "items[1].number", "is missing"),
        ("table", {"exceptions": {}}, "table.default", "is missing"),
        ("beside", None, "", "unknown key 'beside'"),
    ],
)
def test_decode_keys(key: str, value: Any, field: str, message: str) -> None:
    """An object has the keys of its record, all of them and no others."""
    with pytest.raises(DecodeError) as caught:
        decode({**VALUE, key: value}, Outer)
    assert (caught.value.field, str(caught.value)) == (field, message)


@pytest.mark.parametrize("key", VALUE)
def test_decode_missing(key: str) -> None:
    """A key without a default must be there."""
    with pytest.raises(DecodeError, match=r"^is missing$") as caught:
        decode({name: value for name, value in VALUE.items() if name != key}, Outer)
    assert caught.value.field == key


@pytest.mark.parametrize("value", [None, True, 1, 1.0, "{}", []])
def test_decode_no_object(value: Any) -> None:
    """A record is made of an object only."""
    with pytest.raises(DecodeError, match=r"^expected an object, found ") as caught:
        decode(value, Outer)
    assert caught.value.field == ""


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_round_trip(section: Any, data: st.DataObject) -> None:
    """Every record of every section comes back from its bytes, and gives the same bytes."""
    record = data.draw(records(section.record))
    text = dumps(section.encode(record))
    decoded = section.decode(loads(text))
    assert decoded == record
    assert dumps(section.encode(decoded)) == text


@settings(deadline=None)
@given(VALUES)
def test_round_trip_values(value: Any) -> None:
    """Any JSON value is read as it was written, types of numbers included."""
    read = loads(dumps(value))
    assert read == value
    assert repr(read) == repr(json.loads(json.dumps(value, sort_keys=True)))


def _nested(levels: int) -> bytes:
    """A number in so many lists."""
    return b"[" * levels + b"0" + b"]" * levels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b" \n", "Expecting value: line 2 column 1 (char 2)"),
        (b"\0", "Expecting value: line 1 column 1 (char 0)"),
        (b"'a'", "Expecting value: line 1 column 1 (char 0)"),
        (b"{} {}", "Extra data: line 1 column 4 (char 3)"),
        (b'"\n"', "Invalid control character at: line 1 column 2 (char 1)"),
        (b"\xff{}", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (
            b'"\xc3"',
            "'utf-8' codec can't decode byte 0xc3 in position 1: invalid continuation byte",
        ),
        (
            b"\xef\xbb\xbf{}",
            "Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)",
        ),
    ],
    ids=repr,
)
def test_loads_no_json(data: bytes, message: str) -> None:
    """What is no JSON in UTF-8 is refused, with the place."""
    with pytest.raises(DecodeError) as caught:
        loads(data)
    assert str(caught.value) == f"not UTF-8 JSON: {message}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', "key 'a' stands twice"),
        (b'[{"x": {"a": 1, "\\u0061": 2}}]', "key 'a' stands twice"),
        (b"NaN", "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b"1e999", "a number is too large"),
        (b'{"a": [-1e999]}', "a number is too large"),
        (b'"\\ud800"', "'\\ud800' holds a lone surrogate"),
        (b'["a\\udfffb"]', "'a\\udfffb' holds a lone surrogate"),
        (b'{"\\ud83d": 1}', "'\\ud83d' holds a lone surrogate"),
        (_nested(MAX_DEPTH + 1), "more than 24 levels of nesting"),
        (_nested(100_000), "more than 24 levels of nesting"),
        (b'{"a":' * 100_000, "more than 24 levels of nesting"),
    ],
    ids=range(13),
)
def test_loads_strict(data: bytes, message: str) -> None:
    """What Python would parse, but could not be written again or told apart, is refused."""
    with pytest.raises(DecodeError) as caught:
        loads(data)
    assert str(caught.value) == message
    assert caught.value.field == ""


def test_loads_huge_integer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An integer that takes long to parse is refused before it is parsed, whatever Python allows.

    The time grows with the square of the digits: for a million of them it takes seconds.
    """
    longest = int("9" * MAX_DIGITS)
    assert loads(b"9" * MAX_DIGITS) == longest
    allowed = sys.get_int_max_str_digits()
    try:
        sys.set_int_max_str_digits(0)
        with pytest.raises(DecodeError, match=r"^an integer of more than 4000 digits$"):
            loads(b"9" * 1_000_000)
    finally:
        sys.set_int_max_str_digits(allowed)


def test_loads_many_values() -> None:
    """Values are counted before they take memory; all that are allowed can be read."""
    assert loads(b"[" + b"0," * 1000 + b"0]") == [0] * 1001
    for value in (b"0,", b"[],", b"{},", b'"",', b"[[]],"):
        data = b"[" + value * (MAX_VALUES // 2 + 1) + b"0"
        data += b",0" * MAX_VALUES + b"]"
        tracemalloc.start()
        with pytest.raises(DecodeError) as caught:
            loads(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()
        assert str(caught.value) == f"more than {MAX_VALUES} values"


def test_loads_long_texts() -> None:
    """Keys and strings have a longest length, up to which they are read."""
    assert loads(dumps({"k" * MAX_KEY: "s" * MAX_TEXT})) == {"k" * MAX_KEY: "s" * MAX_TEXT}
    start = "x" * 80
    with pytest.raises(DecodeError) as caught:
        loads(dumps({"x" * (MAX_KEY + 1): 0}))
    assert str(caught.value) == f"'{start}…' is longer than {MAX_KEY} characters"
    with pytest.raises(DecodeError) as caught:
        loads(dumps(["x" * (MAX_TEXT + 1)]))
    assert str(caught.value) == f"'{start}…' is longer than {MAX_TEXT} characters"


def test_loads_duplicate_among_many() -> None:
    """A key that stands twice among very many is found in a time that grows with their number."""
    keys = "".join(f'"{number}":0,' for number in range(300_000))
    with pytest.raises(DecodeError, match=r"^key '299999' stands twice$"):
        loads(f'{{{keys}"299999":0}}'.encode())  # by comparing each with each, half an hour


def test_decode_stops_at_first_error() -> None:
    """Of very many values that do not fit, one error is kept and not one for each."""
    value = {**VALUE, "by_name": dict.fromkeys(map(str, range(100_000)), "1")}
    tracemalloc.start()
    with pytest.raises(DecodeError) as caught:
        decode(value, Outer)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert caught.value.field == "by_name[0]"


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"[]", []),
        (b' {"a": 1}\r\n', {"a": 1}),
        (b"1e3", 1000.0),
        (b'"\\ud83d\\ude00 \xe2\x80\xa8"', "😀 \u2028"),
        (b"1e-999", 0.0),
    ],
)
def test_loads(data: bytes, value: Any) -> None:
    """JSON is read, whatever stands at the top."""
    assert loads(data) == value


def test_loads_depth() -> None:
    """As many levels as are allowed are allowed."""
    value = loads(_nested(MAX_DEPTH))
    for _ in range(MAX_DEPTH):
        (value,) = value
    assert value == 0


def test_dumps() -> None:
    """JSON for people: a key a line, keys sorted, text as it is, a newline at the end."""
    text = dumps({"b": [1, 1.0, True, None], "a": {"é": "ü"}})
    expected = """\
{
  "a": {
    "é": "ü"
  },
  "b": [
    1,
    1.0,
    true,
    null
  ]
}
"""
    assert text.decode() == expected


def test_canonical() -> None:
    """JSON to digest: keys sorted, no space."""
    value = {"b": [1, 1.0, True, None], "a": {"é": "ü ü"}}
    assert canonical(value).decode() == '{"a":{"é":"ü ü"},"b":[1,1.0,true,null]}'


@pytest.mark.parametrize("write", [dumps, canonical])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_infinity(write: Any, value: float) -> None:
    """What is no JSON is not written either."""
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write({"a": value})


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.integers()).map(lambda value: list(value.items())))
def test_order_is_no_matter(items: list[tuple[str, int]]) -> None:
    """The same keys and values give the same bytes in whatever order they come."""
    for write in (dumps, canonical):
        assert write(dict(items)) == write(dict(reversed(items)))


@given(VALUES, VALUES)
def test_what_is_alike_does_not_differ(first: Any, second: Any) -> None:
    """It is told apart as strictly as the fields of a mismatch are."""
    assert alike(first, second) == (diff("section", first, second) == ())


@pytest.mark.parametrize(
    ("first", "second"), [(True, 1), (1, 1.0), ((1,), (True,)), ({"a": 0}, {"a": False})]
)
def test_equal_values_of_other_types_are_not_alike(first: Any, second: Any) -> None:
    """Python takes them for equal; in JSON they are others."""
    assert first == second
    assert not alike(first, second)


def test_records_are_alike_by_what_is_in_their_json() -> None:
    """One field that differs is enough, but for what lives beside the JSON."""
    assert alike(RECORD, attrs.evolve(RECORD, beside="another"))
    assert not alike(RECORD, attrs.evolve(RECORD, count=4))
    assert not alike(RECORD, attrs.evolve(RECORD, inner=Inner(number=0.25)))
    assert not alike(RECORD, attrs.evolve(RECORD, table=Table(default=True, exceptions={})))
    assert not alike(RECORD, RECORD.inner)
