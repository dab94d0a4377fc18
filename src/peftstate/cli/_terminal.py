"""What the commands share: consoles, exit codes, and how an error ends the program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated, NoReturn, TypeAlias

import typer
from rich.console import Console

from peftstate._diff import Json
from peftstate.errors import (
    AdapterNotFoundError,
    ManifestNotFoundError,
    PeftStateError,
    SchemaVersionError,
    ServerError,
)

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Exit(IntEnum):
    """What the exit codes mean; 2 is wrong usage."""

    OK = 0
    DIFFERS = 1
    UNVERIFIABLE = 3  # there is no manifest, or one that this version cannot read


Source: TypeAlias = Annotated[
    str, typer.Argument(metavar="PATH_OR_REPO", help="An adapter's folder, or a repo of the Hub.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Html: TypeAlias = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page that needs no other.")
]
TrustedKeys: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--trusted-key", metavar="PEM", help="A public key that must have signed it; repeatable."
    ),
]


def print_json(value: Json) -> None:
    """Print a value for other programs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def exit_code(error: PeftStateError | OSError) -> Exit:
    """The exit code that stands for an error: one of ours, of the Hub, or of the system."""
    compared = isinstance(error, PeftStateError) and not isinstance(
        error, (AdapterNotFoundError, ManifestNotFoundError, SchemaVersionError, ServerError)
    )
    return Exit.DIFFERS if compared else Exit.UNVERIFIABLE


def in_one_line(error: PeftStateError | OSError) -> str:
    """An error as it is printed. Of those of the Hub only the first lines says what is wrong."""
    text = str(error)
    if not isinstance(error, PeftStateError):
        text = next((line for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"


@contextmanager
def errors_end_the_program() -> Iterator[None]:
    """Print an error of ours, of the Hub or of the system without a traceback, and exit."""
    try:
        yield
    except (PeftStateError, OSError) as error:
        fail(in_one_line(error), exit_code(error))


def fail(message: str, code: Exit) -> NoReturn:
    """Say what is wrong, and exit."""
    err.print(message, style="red", markup=False)
    raise typer.Exit(code)
