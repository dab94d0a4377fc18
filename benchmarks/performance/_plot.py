"""The growth of the costs as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.fidelity._libraries import PEFT, PEFTSTATE
from benchmarks.performance._growth import Growth
from benchmarks.performance._measure import wall

_COLOURS = {PEFT.name: "#9aa4af", PEFTSTATE.name: "#4c78a8"}
_INK, _FAINT, _GRID = "#24292f", "#6e7781", "#d8dee4"
_COLUMNS = 2
_WIDTH, _HEIGHT = 4.4, 2.9
"""Inches of one part of the picture."""


def draw(growths: Sequence[Growth], path: Path) -> None:
    """Draw the times of loads, a part of the picture for each thing that grows."""
    figure_of(growths).savefig(path, dpi=120)


def figure_of(growths: Sequence[Growth]) -> Figure:
    """The picture."""
    rows = -(-len(growths) // _COLUMNS)
    figure = Figure(figsize=(_WIDTH * _COLUMNS, _HEIGHT * rows), layout="constrained")
    parts = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for growth, part in zip(growths, parts, strict=False):
        _draw_one(part, growth)
    for part in list(parts):  # those that are left over
        part.set_axis_off()
    return figure


def _draw_one(axes: Any, growth: Growth) -> None:
    """Two lines, of plain PEFT and of peftstate."""
    sizes = [size for size, _ in growth.points]
    times = {
        PEFT.name: [wall(comparison.other) for _, comparison in growth.points],
        PEFTSTATE.name: [wall(comparison.ours) for _, comparison in growth.points],
    }
    for name, seconds in times.items():
        milliseconds = [1e3 * each for each in seconds]
        axes.plot(sizes, milliseconds, marker="o", markersize=4, color=_COLOURS[name], label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(growth.against, fontsize=9, color=_FAINT)
    axes.set_ylabel("milliseconds", fontsize=9, color=_FAINT)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.tick_params(labelsize=8.5, colors=_FAINT, length=0)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#afb8c1")
