"""The commands, gathered in one program."""

from __future__ import annotations

import typer

from peftstate.cli import (
    adopt,
    base_args,
    demo,
    diagnose,
    diff,
    probe,
    run,
    schema,
    show,
    sign,
    verify,
    vllm_args,
)

app = typer.Typer(
    name="peftstate",
    help="Save and reload PEFT adapters bit for bit, or learn what differs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a script's traceback is the script's
    add_completion=False,
)
app.command()(show.show)
app.command()(verify.verify)
app.command()(diff.diff)
app.command()(diagnose.diagnose)
app.command()(adopt.adopt)
app.command(cls=run.RunCommand, options_metavar=run.USAGE)(run.run)
app.command()(sign.sign)
app.command()(base_args.base_args)
app.command()(vllm_args.vllm_args)
app.command()(probe.probe)
app.command()(schema.schema)
app.command()(demo.demo)


def main() -> None:
    """Run the program."""
    app()
