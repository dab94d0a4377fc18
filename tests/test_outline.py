"""What a manifest says, for a person to read."""

from __future__ import annotations

from pathlib import Path

import attrs

import peftstate
from peftstate._outline import Line, _lines, outline

GOLDEN = Path(__file__).parent / "golden" / "schema-1"


def said(value):
    """The lines of a value, as pairs."""
    return [attrs.astuple(line) for line in _lines("field", value)]


def test_scalars_are_said_in_words():
    """Yes and no, not True and False; what is not there is left out."""
    assert said({"z": True, "a": False, "b": 2.5, "c": None, "d": [], "e": {}}) == [
        ("field.z", "yes"),
        ("field.a", "no"),
        ("field.b", "2.5"),
    ]


def test_long_values_are_cut():
    """A digest to its beginning, a text to a line."""
    assert said("ab" * 32) == [("field", "abababababab…")]
    assert said("x" * 80) == [("field", "x" * 72 + "…")]


def test_what_a_terminal_would_obey_is_said():
    """A text or a name from a manifest moves no cursor, and stays in its line."""
    assert said("a\n\x1b[31mb") == [("field", "a\\n\\x1b[31mb")]
    assert said({"\x1b": 1}) == [("field[\\x1b]", "1")]


def test_tensors_are_counted():
    """One tensor by its dtype, shape and digest; a mapping of them by their number."""
    tensor = {"digest": "cd" * 32, "dtype": "float32", "shape": [2, 3]}
    assert said(tensor) == [("field", "float32, 2 x 3, digest cdcdcdcdcdcd…")]
    assert said({**tensor, "shape": [], "digest": None}) == [
        ("field", "float32, scalar, digest none")
    ]
    assert said({"a": tensor, "b": tensor}) == [("field", "2 tensors")]
    assert said({"a": tensor}) == [("field", "1 tensor")]


def test_tables_are_their_default():
    """A default, and how many differ from it; defaults that have fields are shown by these.

    A table without names says nothing.
    """
    assert said({"default": None, "exceptions": {}}) == []
    table = {"default": "bfloat16", "exceptions": {"norm": "float32"}}
    assert said(table) == [("field", "bfloat16, 1 otherwise")]
    assert said({**table, "exceptions": {}}) == [("field", "bfloat16")]
    assert said({"default": {"kind": "Linear4bit"}, "exceptions": {}}) == [
        ("field.default.kind", "Linear4bit")
    ]


def test_lists_and_mappings_are_short_or_counted():
    """A few items are said, many are counted, what they hold is said one by one."""
    assert said(["q_proj", "v_proj"]) == [("field", "q_proj, v_proj")]
    assert said(list(range(17))) == [("field", "17 entries")]
    assert said({str(number): number for number in range(17)}) == [("field", "17 entries")]
    assert said([{"a": 1}, {"a": 2}]) == [("field[0].a", "1"), ("field[1].a", "2")]


def test_a_manifest_is_said_section_by_section():
    """What a reader looks for is there: the quantization, the adapter's rank, its targets."""
    sections = outline(peftstate.read_manifest(GOLDEN / "nf4-kbit"))
    assert Line("config.bnb_4bit_quant_type", "nf4") in sections["quantization"]
    assert Line("adapters.default.config.r", "2") in sections["adapters"]
    assert Line("tensors", "26 tensors") in sections["base_model"]
    assert sections["extra_tensors"] == []
