"""``peftstate diff``: what differs between two saved states, by what it does to predictions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from peftstate import _files
from peftstate._diff import Mismatch, Presence, printable
from peftstate._html import page, report_html
from peftstate._report import Report
from peftstate.cli._terminal import (
    AsJson,
    Exit,
    Html,
    Source,
    errors_end_the_program,
    out,
    print_json,
)

EFFECTS: Mapping[str, tuple[str, ...]] = {
    "changes the predictions": (
        "quantization",
        "base_model",
        "dtype",
        "adapters",
        "extra_tensors",
        "implementation",
        "predictions",
    ),
    "changes what goes in": ("tokenizer",),
    "changes sampled text": ("generation", "rng"),
    "changes training, and dropout": ("training",),
    "may change the last bits": ("runtime", "environment"),
}
"""What a difference in each section does."""
_SHOWN = 4
"""Differences of a kind that are printed: of a large model thousands of tensors may differ."""


def diff(
    first: Source,
    second: Annotated[str, typer.Argument(metavar="PATH_OR_REPO", help="The other one.")],
    html: Html = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Compare the states that were saved with two adapters."""
    with errors_end_the_program():
        report = _files.diff(_files.read_manifest(first), _files.read_manifest(second))
    if html is not None:
        html.write_text(_page(report, first, second), encoding="utf-8")
        out.print(f"Wrote {html}.", markup=False)
    elif as_json:
        print_json([to_json(mismatch) for mismatch in report.mismatches])
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(Exit.DIFFERS)


def to_json(mismatch: Mismatch) -> dict[str, object]:
    """A mismatch for other programs; a value that is absent, or only present, is left out."""
    values = {"saved": mismatch.saved, "found": mismatch.found}
    present = {key: value for key, value in values.items() if not isinstance(value, Presence)}
    return {"section": mismatch.section, "field": mismatch.field, **present}


def _print(report: Report) -> None:
    """Print the differences, in groups."""
    for effect, sections in EFFECTS.items():
        found = report.of(*sections)
        if not found.ok:
            out.print(effect, style="bold cyan")
        for line in _lines(found.mismatches):
            out.print(f"  {line}", markup=False)
    if report.ok:
        out.print("The saved states are the same.")


def _lines(mismatches: Iterable[Mismatch]) -> Iterator[str]:
    """A line for each difference, but of many of a kind a few and the number of the others."""
    kinds = defaultdict(list)
    for mismatch in mismatches:
        kinds[re.sub(r"\[[^\]]+\]", "[…]", mismatch.path)].append(mismatch)
    for kind, alike in kinds.items():
        yield from map(str, alike[:_SHOWN])
        if len(alike) > _SHOWN:
            yield f"… and {len(alike) - _SHOWN} more of {printable(kind)}"


def _page(report: Report, first: str, second: str) -> str:
    """The differences as a page, in groups."""
    groups = {effect: report.of(*sections) for effect, sections in EFFECTS.items()}
    body = [f"<h2>{effect}</h2>{report_html(found)}" for effect, found in groups.items()]
    names = f"{Path(first).name} and {Path(second).name}"
    return page(f"Saved states of {names}", "".join(body))
