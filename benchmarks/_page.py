"""Tables of figures, and the pages of `docs/` that hold them.

A page is written by hand but for what stands between ``<!-- begin: NAME -->`` and
``<!-- end: NAME -->``, which the benchmark of that name replaces.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@attrs.frozen(kw_only=True)
class Table:
    """The figures of one benchmark.

    Attributes:
        name: The benchmark's name, as in its command and in the marks of its page.
        command: What reproduces it.
        columns: The heads of the columns.
        rows: The cells, as many to a row as there are columns.
        note: What the figures add up to, in a sentence or two.
    """

    name: str
    command: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table with its note, the command and what it ran on."""
        lines = [
            _row(self.columns),
            _row(["---"] * len(self.columns)),
            *map(_row, self.rows),
        ]
        if self.note:
            lines += ["", self.note]
        return "\n".join([*lines, "", f"`{self.command}`, on {machine()}"])


def _row(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def machine() -> str:
    """What a benchmark ran on: cores, versions, and the commit."""
    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['cores']} cores ({found['machine']}), Python {found['python']}, {versions}, "
        f"commit {found['commit']}"
    )


def environment() -> dict[str, Any]:
    """The same for a program."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "peftstate")
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of this checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or "unknown"


def write(table: Table, page: str) -> None:
    """Put a table in its place on a page of `docs/`.

    Args:
        table: What was measured.
        page: The name of the page, such as ``"reliability.md"``.

    Raises:
        ValueError: The page has no place for it.
    """
    path = DOCS / page
    begin, end = f"<!-- begin: {table.name} -->", f"<!-- end: {table.name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    if not pattern.search(text):
        raise ValueError(f"{path} has no {begin} … {end}")
    block = f"{begin}\n{table.markdown()}\n{end}"
    path.write_text(pattern.sub(lambda _: block, text), encoding="utf-8")
