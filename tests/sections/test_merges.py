"""Tests of the order in which adapters are merged again."""

from __future__ import annotations

import pytest

from peftstate.sections._merges import order_of


@pytest.mark.parametrize(
    ("layers", "order"),
    [
        ([], ()),
        ([["b", "a"], ["b", "a"]], ("b", "a")),
        ([["a", "c"], ["b", "c"], ["a", "b"]], ("a", "b", "c")),
        ([["c"], ["b", "c"], ["a", "b"]], ("a", "b", "c")),
    ],
    ids=str,
)
def test_each_layer_gets_its_order(layers, order):
    """Layers that have some of the adapters only say together what the order was."""
    assert order_of(layers) == order


def test_an_order_that_will_do_is_taken():
    """Where the layers leave it open, a record is not contradicted."""
    assert order_of([["a"], ["b"]], ["b", "a"]) == ("b", "a")
    assert order_of([["a"], ["b"]], ["a", "b"]) == ("a", "b")
    assert order_of([["b", "a"]], ["a", "b"]) == ("b", "a")


def test_layers_that_contradict_each_other():
    """There is no such order; the names come sorted, and the weights will tell."""
    assert order_of([["b", "a"], ["a", "b"]]) == ("a", "b")
