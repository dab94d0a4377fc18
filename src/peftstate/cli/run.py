"""``peftstate run``: a script or a module, with PEFT's own classes keeping the whole state."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from peftstate._policy import OnMismatch
from peftstate.cli._terminal import TrustedKeys

USAGE = "[OPTIONS] {SCRIPT | -m MODULE} [ARGS]..."
_EXTENSIONS = {"lm_eval": "peftstate.integrations.lm_eval"}
"""Modules that can be run → what adds itself to them by being imported."""


class RunCommand(TyperCommand):
    """As `python` does: all that follows the script, or the module, is for that."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options that come first; the rest becomes the context's arguments."""
        end = _end_of_options(args)
        super().parse_args(ctx, args[:end])
        ctx.args = args[end:]
        return args[end:]


def _end_of_options(args: Sequence[str]) -> int:
    """The place of the first argument that is not ours: the script, or what follows ``-m``."""
    place = 0
    while place < len(args) and args[place].startswith("-"):
        name = args[place]
        takes_value = name in ("-m", "--module", "--on-mismatch", "--trusted-key")
        place += 2 if takes_value else 1
        if name.startswith(("-m", "--module")):
            break
    return place


def run(
    context: typer.Context,
    module: Annotated[
        str | None, typer.Option("--module", "-m", help="A module to run, as python -m does.")
    ] = None,
    on_mismatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SECTION=]ACTION",
            help="error, warn or ignore: for all sections, or for one. May be repeated.",
        ),
    ] = None,
    trusted_key: TrustedKeys = None,
    *,
    require_manifest: Annotated[
        bool, typer.Option("--require-manifest", help="Refuse adapters without a manifest.")
    ] = False,
) -> None:
    """Run SCRIPT, or -m MODULE, unedited behind peftstate.install().

    Whatever it saves with PEFT carries a manifest, and whatever it loads is verified.
    """
    args = list(context.args)
    if module is None and not args:
        raise typer.BadParameter("say what to run: a script, or -m and a module")
    if module is None and not Path(args[0]).exists():
        raise typer.BadParameter(f"there is no script {args[0]!r}")
    actions = _on_mismatch(on_mismatch or [])

    from peftstate._install import install

    try:
        install(on_mismatch=actions, require_manifest=require_manifest, trusted_keys=trusted_key)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if module is None:
        sys.argv = args
        sys.path.insert(0, str(Path(args[0]).resolve().parent))
        runpy.run_path(args[0], run_name="__main__")
    else:
        sys.argv = [module, *args]
        sys.path.insert(0, str(Path.cwd()))
        if module in _EXTENSIONS:
            importlib.import_module(_EXTENSIONS[module])
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _on_mismatch(values: Sequence[str]) -> OnMismatch | None:
    """What was given as ``ACTION`` or ``SECTION=ACTION``; of what is wrong `install` tells."""
    by_section: dict[str, Any] = {}
    for value in values:
        section, _, action = value.rpartition("=")
        if not section:
            if len(values) > 1:
                raise typer.BadParameter(
                    f"--on-mismatch {action} is for all sections; say it alone"
                )
            everything: Any = action
            return everything  # type: ignore[no-any-return]
        by_section[section] = action
    return by_section or None
