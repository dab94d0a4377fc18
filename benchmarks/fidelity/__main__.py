"""Runs the situations with both libraries, prints the tables, and puts them on their page."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import _page
from benchmarks.fidelity._models import Place
from benchmarks.fidelity._outcome import Kind
from benchmarks.fidelity._run import run
from benchmarks.fidelity._situation import Situation
from benchmarks.fidelity._tables import Row, tables
from benchmarks.fidelity.situations import FURTHER, OF_CAUSES

PAGE = "fidelity.md"


def measure(situations: Sequence[Situation]) -> Iterator[Row]:
    """Run situations with both libraries."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for situation in situations:
            peft, ours = run(situation, place)
            yield Row(situation=situation, peft=peft, ours=ours)


def quick() -> list[Situation]:
    """The first situation of each letter, and one more."""
    by_letter: dict[str, Situation] = {}
    for situation in OF_CAUSES:
        by_letter.setdefault(situation.cause[0], situation)
    return [*by_letter.values(), FURTHER[0]]


def chosen(arguments: argparse.Namespace) -> list[Situation]:
    """The situations to run."""
    if arguments.quick:
        return quick()
    return [each for each in (*OF_CAUSES, *FURTHER) if each.id.startswith(arguments.only)]


def report(row: Row, *, verbose: bool) -> None:
    """Show how far the run is, and what is not as it should be."""
    print(f"{row.situation.id}: {row.peft} | {row.ours}", file=sys.stderr)
    if row.problem:
        print(f"  {row.problem}", file=sys.stderr)
    if verbose and row.peft.kind is Kind.SILENT:
        for message in dict.fromkeys(row.peft.messages):
            print(f"  plain PEFT said: {message.text}", file=sys.stderr)


def main() -> int:
    """Run the benchmark; the status tells whether every outcome of ours is the expected one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a situation of each kind, in seconds")
    parser.add_argument("--only", default="", help="situations whose names begin so, such as B6")
    parser.add_argument("--verbose", action="store_true", help="what PEFT said of silent ones")
    parser.add_argument("--write", action="store_true", help="put the tables on their page")
    arguments = parser.parse_args()
    if arguments.write and (arguments.quick or arguments.only):
        parser.error("the page has all situations")
    torch.set_num_threads(1)  # the models are tiny
    rows = []
    for row in measure(chosen(arguments)):
        report(row, verbose=arguments.verbose)
        rows.append(row)
    for table in tables(rows):
        print(table.markdown(), end="\n\n")
        if arguments.write:
            _page.write(table, PAGE)
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
