"""``peftstate demo``: what plain PEFT loses of a model, and what peftstate keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftstate.cli._terminal import Exit, fail, out


def demo(
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_ID", help="The base model; else a tiny one."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 3,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to save the adapter, to keep it.")
    ] = None,
) -> None:
    """Train a QLoRA adapter with TRL, save it, reload it in four ways, and compare.

    Two reloads are plain PEFT, two are peftstate. It takes TRL: pip install 'peftstate[trl]'.

    Exits with 0 if both reloads with peftstate are the model that was saved, else with 1.
    """
    try:
        from peftstate._demo.flow import demonstrate
    except ModuleNotFoundError as error:
        if error.name not in {"datasets", "trl"}:
            raise
        fail("The demo trains with TRL: pip install 'peftstate[trl]'", Exit.UNVERIFIABLE)
    raise typer.Exit(demonstrate(model, output, steps, out))
