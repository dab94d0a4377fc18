"""``peftstate verify``: are the files of adapters what was saved?"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import attrs
import typer
from rich.progress import track

from peftstate._progress import are_disabled
from peftstate._report import Report
from peftstate._storage import ADAPTER_CONFIG_NAME, MANIFEST_NAME, RESERVED_PREFIX
from peftstate._verifying import verify_files
from peftstate._work import usable_cores
from peftstate.cli._terminal import (
    AsJson,
    Exit,
    TrustedKeys,
    err,
    exit_code,
    in_one_line,
    out,
    print_json,
)
from peftstate.cli.diff import to_json
from peftstate.errors import PeftStateError

_SHOWN = 5
"""Differences of one adapter that are printed."""
_MANY = 128
"""Adapters for which a process for each core is worth its start: files are hashed in threads just
as well, but to read a manifest takes Python itself, at which threads take turns."""
_MOST_PROCESSES = 61
"""More of them Windows cannot wait for."""

Sources: TypeAlias = Annotated[
    list[str], typer.Argument(metavar="PATH_OR_REPO", help="Adapters' folders, or repos.")
]


@attrs.frozen
class _Verdict:
    """What was found of one adapter.

    Attributes:
        source: Its folder or repo.
        code: What the exit code would be for it alone.
        report: What was compared; `None` if it could not be.
        error: Why not.
    """

    source: str
    code: Exit
    report: Report | None = None
    error: str = ""

    def lines(self) -> Iterator[str]:
        """What is printed: a line, and one for each difference and note."""
        word = {Exit.OK: "ok", Exit.DIFFERS: "DIFFERS", Exit.UNVERIFIABLE: "NOT VERIFIED"}
        yield f"{word[self.code]:<12} {self.source}"
        if self.error:
            yield f"  {self.error}"
        if self.report is not None:
            mismatches = self.report.mismatches
            yield from (f"  {mismatch}" for mismatch in mismatches[:_SHOWN])
            if len(mismatches) > _SHOWN:
                yield f"  … and {len(mismatches) - _SHOWN} more"
            yield from (f"  note: {note}" for note in self.report.notes)

    def to_json(self) -> dict[str, object]:
        """The same for other programs."""
        report = self.report or Report((), ())
        return {
            "source": self.source,
            "ok": self.code is Exit.OK,
            "error": self.error or None,
            "mismatches": [to_json(mismatch) for mismatch in report.mismatches],
            "notes": list(report.notes),
        }


def verify(
    sources: Sources,
    trusted_key: TrustedKeys = None,
    *,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Verify all adapters below the folders.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify that the files of adapters are those that were saved.

    Exits with 0 if all are, with 1 if one is not, and with 3 if one has nothing to verify it by.
    """
    found = [folder for source in sources for folder in _adapters(source)] if recursive else sources
    if not found:
        err.print("There is no adapter below these folders.")
        raise typer.Exit(Exit.UNVERIFIABLE)
    verdicts = []
    with _verdicts(found, trusted_key) as results:
        for verdict in _shown(results, len(found)):
            verdicts.append(verdict)
            if not as_json:
                out.print("\n".join(verdict.lines()), markup=False)
    if as_json:
        print_json([verdict.to_json() for verdict in verdicts])
    elif len(verdicts) > 1:
        out.print(_summary(verdicts))
    codes = {verdict.code for verdict in verdicts}
    raise typer.Exit(next(c for c in (Exit.DIFFERS, Exit.UNVERIFIABLE, Exit.OK) if c in codes))


def _shown(results: Iterable[_Verdict], number: int) -> Iterable[_Verdict]:
    """The verdicts, with a bar for many that says how far they are."""
    bar = out if out.is_terminal else err  # what is printed meanwhile goes above it
    if number == 1 or not bar.is_terminal or are_disabled():
        return results
    return track(results, "Verifying", total=number, console=bar, transient=True)


def _adapters(source: str) -> Iterator[str]:
    """The adapters' folders below a folder, itself included, sorted."""
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = sorted(n for n in subfolders if not n.startswith(RESERVED_PREFIX))
        if {ADAPTER_CONFIG_NAME, MANIFEST_NAME} & set(files):
            yield folder


@contextmanager
def _verdicts(
    sources: Sequence[str], trusted_keys: Sequence[Path] | None
) -> Iterator[Iterable[_Verdict]]:
    """Verify adapters, several at a time; the verdicts come in the order of the adapters."""
    verdict = partial(_verdict, trusted_keys=trusted_keys)
    if len(sources) == 1:  # in this thread, which may show how far it is
        yield map(verdict, sources)
    elif len(sources) < _MANY:
        with ThreadPoolExecutor(usable_cores()) as threads:
            yield threads.map(verdict, sources)
    else:
        ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program as a whole
        number = min(usable_cores(), _MOST_PROCESSES)
        pool = ProcessPoolExecutor(number, initializer=signal.signal, initargs=ignore)
        with pool as processes:
            yield processes.map(verdict, sources, chunksize=8)


def _verdict(source: str, trusted_keys: Sequence[Path] | None) -> _Verdict:
    """Verify one adapter."""
    try:
        report = verify_files(source, trusted_keys=trusted_keys)
    except (PeftStateError, OSError) as error:
        return _Verdict(source, exit_code(error), error=in_one_line(error))
    return _Verdict(source, Exit.OK if report.ok else Exit.DIFFERS, report)


def _summary(verdicts: Sequence[_Verdict]) -> str:
    """How many adapters are as they were saved."""
    ok, differ, unverified = (
        sum(verdict.code is code for verdict in verdicts)
        for code in (Exit.OK, Exit.DIFFERS, Exit.UNVERIFIABLE)
    )
    return f"{len(verdicts)} adapters: {ok} ok, {differ} differ, {unverified} not verified."
