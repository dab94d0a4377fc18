"""The commands, gathered in one program."""

from __future__ import annotations

import typer

from peftstate.cli import run

app = typer.Typer(
    name="peftstate",
    help="Save and reload PEFT adapters bit for bit, or learn what differs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a script's traceback is the script's
    add_completion=False,
)


@app.callback()
def _program() -> None:
    """Have the program's one command be called by its name, too."""


app.command("run", cls=run.RunCommand, options_metavar=run.USAGE)(run.run)


def main() -> None:
    """Run the program."""
    app()
