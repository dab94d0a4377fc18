"""``peftstate probe``: does a server serve the model that was saved?"""

from __future__ import annotations

from typing import Annotated

import attrs
import typer

from peftstate._served import ServedReport, Verdict
from peftstate._served import probe as ask
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

_CODES = {
    Verdict.OK: Exit.OK,
    Verdict.DIFFERS: Exit.DIFFERS,
    Verdict.UNDECIDED: Exit.UNVERIFIABLE,
}
_WORDS = {Verdict.OK: "ok", Verdict.DIFFERS: "DIFFERS", Verdict.UNDECIDED: "NOT VERIFIED"}


def probe(  # noqa: PLR0917 - typer passes options by their names
    source: Source,
    url: Annotated[str, typer.Option(help="The server, such as http://localhost:8000.")],
    model: Annotated[
        str | None, typer.Option(help="What it calls the adapter; else the one that it serves.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="What it calls the base model; else the adapter's parent.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="The largest difference, in nats.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="PEFTSTATE_API_KEY", help="A key that the server wants.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each answer.")] = 60.0,
    trusted_key: TrustedKeys = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Ask a server with an API like OpenAI's for what the saved model predicted, and compare.

    Exits with 0 if its answers are the saved model's, with 1 if they are not, and with 3 if it does
    not tell, cannot be reached, or the manifest has no probe. torch is not needed.
    """
    with errors_end_the_program():
        try:
            report = ask(
                url,
                source,
                model=model,
                base_model=base_model,
                tolerance=tolerance,
                api_key=api_key,
                timeout=timeout,
                trusted_keys=trusted_key,
            )
        except PeftStateError:
            raise
        except ValueError as error:
            fail(str(error), Exit.UNVERIFIABLE)
    if as_json:
        print_json({**attrs.asdict(report), "verdict": report.verdict.value, "ok": report.ok})
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(_CODES[report.verdict])


def _print(report: ServedReport) -> None:
    """Print a verdict with its figures."""
    out.print(f"{_WORDS[report.verdict]:<12} {report.model}: {report.reason}", markup=False)
    figures = (
        f"  {report.tokens} log-probabilities; largest difference {report.max_difference:.3g}, "
        f"mean {report.mean_difference:.3g}; allowed {report.tolerance:.3g}"
    )
    out.print(figures, markup=False)
    if report.base_model is not None:
        of_base = (
            f"  {report.base_model}, without the adapter: largest difference "
            f"{report.base_max_difference:.3g}, mean {report.base_mean_difference:.3g}"
        )
        out.print(of_base, markup=False)
