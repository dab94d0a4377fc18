"""Measures, prints the tables, and puts them and the picture on their page."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it

from benchmarks import _page
from benchmarks.performance import _plot
from benchmarks.performance._run import QUICK, SYNTHETIC, WITH_GEMMA, measure
from benchmarks.performance._tables import tables

PAGE = "performance.md"
PICTURE = _page.DOCS / "images" / "performance.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gemma", action="store_true", help="with the real Gemma 3 270M")
    parser.add_argument("--quick", action="store_true", help="one run of each, on tiny models")
    parser.add_argument("--repetitions", type=int, help="how many runs of everything count")
    parser.add_argument("--json", type=Path, metavar="OUT", help="put all figures into a file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the growth into a file")
    parser.add_argument("--write", action="store_true", help="put tables and picture on the page")
    options = parser.parse_args(arguments)
    if options.write and not options.gemma:
        parser.error("the page has Gemma")
    extent = QUICK if options.quick else WITH_GEMMA if options.gemma else SYNTHETIC
    if options.repetitions:
        extent = extent.repeated(options.repetitions)
    with tempfile.TemporaryDirectory(prefix="peftstate-bench-") as folder:
        results = measure(extent, Path(folder))
    for table in tables(results):
        print(table.markdown(), end="\n\n")
        if options.write:
            _page.write(table, PAGE)
    if options.json:
        found = {**_page.environment(), **results.to_json()}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for path in filter(None, (options.plot, PICTURE if options.write else None)):
        _plot.draw(results.growths, path)


if __name__ == "__main__":
    main()
