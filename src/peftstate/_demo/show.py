"""What the demo prints, and what it keeps from being printed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs
import datasets
import transformers
from rich.table import Table

from peftstate._demo.measure import Comparison, State


@contextmanager
def quiet() -> Iterator[None]:
    """Keep upstream's progress bars and warnings out of the output."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        datasets.utils.logging.enable_progress_bar()
        transformers.utils.logging.enable_progress_bar()
        transformers.utils.logging.set_verbosity(verbosity)


def table(comparisons: Sequence[Comparison]) -> Table:
    """Show the comparisons: one column a reload, one row a thing that can be lost."""
    view = Table("", *(comparison.title for comparison in comparisons))
    view.add_row("max |Δ logits|", *(_number(c.logit_difference) for c in comparisons))
    view.add_row("sampled text", *("same" if c.same_text else "differs" for c in comparisons))
    for field in attrs.fields(State):
        view.add_row(
            field.name.replace("_", " "),
            *("kept" if c.kept[field.name] else "lost" for c in comparisons),
        )
    return view


def _number(difference: float) -> str:
    """Write a difference so that a small one does not look like none."""
    return f"{difference:.3g}" if difference else "0.0"
