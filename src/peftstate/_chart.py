"""A diagnosis as a bar chart."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from peftstate._diagnosis import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from peftstate._diagnosis import Cause, Diagnosis

_WIDE_SPAN = 30
"""The largest effect over the smallest from which on the axis is logarithmic."""
_BAR, _APART, _TOTAL = "#4c78a8", "#a9bfd8", "#3b3f46"
_INK, _FAINT = "#24292f", "#6e7781"
_LONGEST = 36
"""Characters of a change that are shown."""
_WIDTH, _ROW, _AROUND, _MARGIN = 7.6, 0.5, 1.7, 0.15
"""Inches: the chart's width, the height of a bar, what is above and below the bars, the margin."""


def draw(diagnosis: Diagnosis, path: str | os.PathLike[str]) -> None:
    """Draw the causes as horizontal bars, the largest first, below the total.

    Args:
        diagnosis: The diagnosis.
        path: The file; its suffix decides the format.

    Raises:
        ImportError: The package `matplotlib` is missing.
        ValueError: There is no such format.
    """
    figure_of(diagnosis).savefig(path, dpi=120)


def figure_of(diagnosis: Diagnosis) -> Figure:
    """The chart as a figure.

    Raises:
        ImportError: The package `matplotlib` is missing.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, no global state
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        message = "charts need the package matplotlib: pip install 'peftstate[plot]'"
        raise ImportError(message) from error

    rows = [("all together", diagnosis.total, _TOTAL)]
    rows += [
        (_label(cause), cause.effect, _BAR if cause.in_total else _APART)
        for cause in diagnosis.causes
    ]
    layout = ConstrainedLayoutEngine(w_pad=_MARGIN, h_pad=_MARGIN)
    figure = Figure(figsize=(_WIDTH, _AROUND + _ROW * len(rows)), layout=layout)
    axes = figure.add_subplot()
    values = [0.0 if effect is None else effect.max_difference for _, effect, _ in rows]
    _scale(axes, [value for value in values if value and math.isfinite(value)])
    low, high = axes.get_xlim()
    shown = [min(value, high) for value in values]
    places = range(len(rows))
    axes.barh(places, shown, color=[color for _, _, color in rows], height=0.62, zorder=2)
    for place, value, (_, effect, _) in zip(places, shown, rows, strict=True):
        largest, divergence, agreement = figures(effect)
        text = largest if effect is None else f"{largest}   KL {divergence}, top-1 {agreement}"
        axes.annotate(
            text,
            (max(value, low), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_INK,
        )
    axes.set_yticks(places, [label for label, _, _ in rows], fontsize=9.5)
    axes.invert_yaxis()
    _decorate(axes, diagnosis)
    return figure


def _scale(axes: Any, values: list[float]) -> None:
    """Choose a linear or a logarithmic axis, with room for the figures to the right of the bars."""
    largest = max(values, default=1.0)
    smallest = min(values, default=largest)
    if largest / smallest > _WIDE_SPAN:
        low = 10.0 ** math.floor(math.log10(smallest) - 0.3)
        axes.set_xscale("log")
        axes.set_xlim(low, low * (largest / low) ** 1.6)
    else:
        axes.set_xlim(0.0, 1.65 * largest)


def _label(cause: Cause) -> str:
    """What stands beside a bar: the cause, and what it changed from and to."""
    change = f"{cause.saved} → {cause.found}"
    change = change if len(change) <= _LONGEST else f"{change[: _LONGEST - 1]}…"
    return f"{cause.name}{'' if cause.in_total else ' (not in the total)'}\n{change}"


def _decorate(axes: Any, diagnosis: Diagnosis) -> None:
    """Title, axis and grid."""
    axes.set_title(
        "Why the predictions differ", loc="left", fontsize=13, fontweight="bold", color=_INK, pad=22
    )
    axes.text(
        0,
        1.01,
        f"{diagnosis.model}; {diagnosis.inputs}",
        transform=axes.transAxes,
        fontsize=9,
        color=_FAINT,
        va="bottom",
    )
    axes.set_xlabel("largest difference of a logit from the saved model", fontsize=9, color=_FAINT)
    axes.grid(axis="x", color="#d8dee4", linewidth=0.7, zorder=0)
    axes.tick_params(axis="x", labelsize=8.5, colors=_FAINT, length=0)
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#afb8c1")
