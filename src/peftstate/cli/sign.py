"""``peftstate sign``: sign the files of adapters with a key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from peftstate._keys import PASSWORD_VARIABLE, signing_key
from peftstate._signing import sign as sign_folder
from peftstate.cli._terminal import Exit, errors_end_the_program, fail, out
from peftstate.errors import PeftStateError


def sign(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Adapters' folders.")],
    key: Annotated[Path, typer.Option(metavar="PEM", help="The private key.")],
) -> None:
    """Sign the files of adapters, so that who has the public key can tell them from others.

    Whoever signs answers for all that lies in the folder. The password of an encrypted key is
    asked for, or taken from PEFTSTATE_KEY_PASSWORD.
    """
    with errors_end_the_program():
        try:
            password = None if PASSWORD_VARIABLE in os.environ else _ask
            private = signing_key(key, password=password)
            for path in paths:
                out.print(f"{path}: signed by {sign_folder(path, private)}", markup=False)
        except PeftStateError:
            raise
        except (ValueError, OSError, ImportError) as error:
            fail(str(error), Exit.DIFFERS)


def _ask() -> str:
    """Ask for the password of a key."""
    password: str = typer.prompt("Password of the key", hide_input=True, err=True)
    return password
