"""Write the commands in `cli.md`, from the help that the program itself gives.

Run ``python docs/commands.py`` after a command changed; a test compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from peftstate.cli.app import app

PAGE = Path(__file__).with_name("cli.md")
BEGIN, END = "<!-- begin commands -->\n", "<!-- end commands -->\n"


def with_commands(page: str) -> str:
    """The page with its commands written anew."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "".join([head, BEGIN, *(f"{line}\n" for line in _lines()), "\n", END, tail])


def _lines() -> Iterator[str]:
    """The lines of all commands."""
    program: Any = typer.main.get_command(app)
    for name, command in program.commands.items():
        yield from ("", f"## `peftstate {name}`", "", inspect.cleandoc(command.help))
        yield from ("", "| argument | |", "| --- | --- |") if command.params else ()
        for parameter in command.params:
            yield f"| {_name(parameter)} | {parameter.help} |"


def _name(parameter: Any) -> str:
    """An argument as it is written on a command line."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}{'...' if parameter.nargs == -1 else ''}`"
    value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
    return ", ".join(f"`{option}{value}`" for option in parameter.opts)


if __name__ == "__main__":
    PAGE.write_text(with_commands(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
