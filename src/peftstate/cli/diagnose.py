"""``peftstate diagnose``: why the predictions differ, with a number for each cause."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftstate._diagnosis import Cause, Diagnosis, figures
from peftstate._diff import printable
from peftstate.cli._terminal import (
    AsJson,
    Exit,
    Source,
    TrustedKeys,
    errors_end_the_program,
    fail,
    out,
    print_json,
)
from peftstate.errors import PeftStateError


def diagnose(
    source: Source,
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_ID", help="The base model; else what the adapter names."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A text to predict on; else what was saved, or fixed ids.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a bar chart: .png, .svg, .pdf.")
    ] = None,
    trusted_key: TrustedKeys = None,
    *,
    as_plain_peft: Annotated[
        bool,
        typer.Option("--as-plain-peft", help="Load the base model as it was, the rest as PEFT."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Load an adapter as tutorials do, and say why it predicts otherwise than the saved model.

    The base model is loaded without further arguments, and the adapter by plain PEFT. Beside that
    the saved model is reloaded exactly, and runs once with each thing in which the two differ.

    Exits with 0 if the predictions are the same to the last bit, with 1 if they are not, or if
    there is no exact reload, and with 3 if there is no manifest.
    """
    with errors_end_the_program():
        from peftstate._diagnosing.run import diagnose as measure

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of what libraries will rename
                found = measure(
                    source,
                    base=base,
                    as_plain_peft=as_plain_peft,
                    prediction_probe=prompt,
                    trusted_keys=trusted_key,
                )
            if plot is not None:
                found.plot(plot)
        except PeftStateError:
            raise
        except (ValueError, ImportError) as error:
            fail(str(error), Exit.UNVERIFIABLE)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
        if plot is not None:
            out.print(f"Wrote {plot}.", markup=False)
    if not found.ok:
        raise typer.Exit(Exit.DIFFERS)


def _print(found: Diagnosis) -> None:
    """Print the verdict, a row for each cause, what to do, and what has no number."""
    out.print(found.verdict, style="bold", markup=False)
    out.print(f"{found.model}; {found.inputs}", style="dim", markup=False)
    if found.causes:
        out.print(_table(found))
    notes = [(cause.name, cause.note) for cause in found.causes if cause.note]
    _print_list("how it was measured", notes)
    effects = ((cause, cause.effect) for cause in found.causes)
    worth = [cause for cause, effect in effects if effect is not None and not effect.is_none]
    _print_list("what to do", [(cause.name, cause.remedy) for cause in worth])
    _print_list("differs too", [(cause.name, cause.note) for cause in found.unmeasured])


def _table(found: Diagnosis) -> Table:
    """The causes with their figures; above the total what is in it, below it what is not."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("cause")
    table.add_column("section", style="dim")
    table.add_column("saved → found", overflow="fold")
    for figure in ("max |Δ|", "KL", "top-1"):
        table.add_column(figure, justify="right", no_wrap=True)

    def add(causes: list[Cause]) -> None:
        for cause in causes:
            change = f"{cause.saved} → {cause.found}"
            cells = (cause.name, cause.section, change, *figures(cause.effect))
            table.add_row(*(Text(printable(cell)) for cell in cells))

    add([cause for cause in found.causes if cause.in_total])
    if found.rest is not None and not found.rest.is_none:
        table.add_row("not explained", "", "", *figures(found.rest))
    table.add_section()
    table.add_row("all together", "", "", *figures(found.total), style="bold")
    table.add_section()
    add([cause for cause in found.causes if not cause.in_total])
    return table


def _print_list(title: str, lines: list[tuple[str, str]]) -> None:
    """Print names, each with a sentence."""
    if not lines:
        return
    out.print(f"\n{title}", style="bold cyan")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(Text(name), Text(text))
    out.print(Padding(table, (0, 0, 0, 2)))
