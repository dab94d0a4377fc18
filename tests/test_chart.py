"""A diagnosis as a bar chart."""

from __future__ import annotations

import sys

import attrs
import pytest

from peftstate import _chart
from tests._diagnosis import DIAGNOSIS, effect


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_chart(tmp_path, suffix):
    """The chart is written in the format of its name."""
    path = tmp_path / f"chart.{suffix}"
    DIAGNOSIS.plot(path)
    beginning = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(beginning)


@pytest.mark.parametrize(
    ("largest", "smallest", "scale"),
    [(20.0, 5.0, "linear"), (20.0, 0.1, "log"), (0.0, 0.0, "linear")],
)
def test_the_axis_of_a_chart(largest, smallest, scale):
    """It is logarithmic where a bar would not be seen otherwise."""
    causes = (
        attrs.evolve(DIAGNOSIS.causes[0], effect=effect(largest)),
        attrs.evolve(DIAGNOSIS.causes[1], effect=effect(smallest)),
    )
    figure = _chart.figure_of(attrs.evolve(DIAGNOSIS, causes=causes, total=effect(largest)))
    (axes,) = figure.axes
    assert axes.get_xscale() == scale
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [largest, largest, smallest]


def test_a_chart_without_matplotlib(tmp_path, monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'peftstate\[plot\]'"):
        DIAGNOSIS.plot(tmp_path / "chart.png")
