"""Tests of the tables of a usual value and exceptions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peftstate._codec import decode, encode
from peftstate.sections._table import Table

NAMES = st.text(max_size=5)
VALUES = st.sampled_from(["bfloat16", "float32", "float16"])
MAPPINGS = st.dictionaries(NAMES, VALUES)


@given(MAPPINGS)
def test_table_gives_back_every_value(values):
    """Nothing is lost by writing the usual value once."""
    table = Table.of(values)
    assert {name: table[name] for name in values} == values


@given(MAPPINGS)
def test_exceptions_are_as_few_as_can_be(values):
    """No other default would leave fewer exceptions."""
    counts = [list(values.values()).count(value) for value in values.values()]
    assert len(Table.of(values).exceptions) == len(values) - max(counts, default=0)


@given(MAPPINGS)
def test_order_makes_no_difference(values):
    """Equal mappings give equal tables, so that equal states give equal manifests."""
    backwards = dict(reversed(values.items()))
    assert Table.of(values) == Table.of(backwards)


@given(MAPPINGS)
def test_table_survives_json(values):
    """A table is decoded as it was encoded, its type of value checked."""
    table = Table.of(values)
    assert decode(encode(table), Table[str]) == table


def test_equally_frequent_values_are_told_apart_by_their_text():
    """Which of them is the default does not depend on the order they came in."""
    assert Table.of({"a": "float32", "b": "bfloat16"}).default == "bfloat16"


def test_empty_table_has_no_default():
    """Without names there is no usual value."""
    table: Table[str] = Table.of({})
    assert table == Table(default=None, exceptions={})
    assert table["anything"] is None


def test_unknown_name_has_the_usual_value():
    """A module that was not there when the state was saved gets what most have."""
    assert Table.of({"a": 1, "b": 1, "c": 2})["new"] == 1
