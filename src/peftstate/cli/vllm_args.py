"""``peftstate vllm-args``: how vLLM is started so that it serves an adapter as it was trained."""

from __future__ import annotations

from typing import Annotated

import typer

from peftstate._vllm_args import engine_arguments
from peftstate.cli._terminal import (
    AsJson,
    Source,
    TrustedKeys,
    err,
    errors_end_the_program,
    out,
    print_json,
)


def vllm_args(
    source: Source,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model, if it lies elsewhere.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the adapter; else its folder's name.")
    ] = None,
    trusted_key: TrustedKeys = None,
    *,
    bitsandbytes_plugin: Annotated[
        bool, typer.Option("--bitsandbytes-plugin", help="vLLM has vllm-bnb-plugin installed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the command that has vLLM serve an adapter, or say which field it cannot serve.

    Exits with 0 and the command, with 1 if vLLM cannot serve the adapter, and with 3 if there is no
    manifest. Neither vLLM nor torch is needed.
    """
    with errors_end_the_program():
        found = engine_arguments(
            source,
            base=base,
            name=name,
            has_bitsandbytes=bitsandbytes_plugin,
            trusted_keys=trusted_key,
        )
    if as_json:
        print_json(
            {"command": found.command, "arguments": found.arguments, "notes": list(found.notes)}
        )
        return
    out.print(found.command, markup=False)
    for note in found.notes:
        err.print(f"note: {note}", markup=False)
