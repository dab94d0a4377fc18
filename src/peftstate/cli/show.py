"""``peftstate show``: what a manifest says."""

from __future__ import annotations

import json

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftstate._files import read_manifest
from peftstate._html import manifest_html, page
from peftstate._outline import Line, heading, outline
from peftstate.cli._terminal import AsJson, Html, Source, errors_end_the_program, out, print_json
from peftstate.manifest import Manifest


def show(source: Source, *, html: Html = None, as_json: AsJson = False) -> None:
    """Show the state that was saved with an adapter, section by section."""
    with errors_end_the_program():
        manifest = read_manifest(source)
    if html is not None:
        html.write_text(page(source, manifest_html(manifest, is_open=True)), encoding="utf-8")
        out.print(f"Wrote {html}.", markup=False)
    elif as_json:
        print_json(json.loads(manifest.to_json()))
    else:
        _print(manifest, source)


def _print(manifest: Manifest, source: str) -> None:
    """Print the outline of a manifest."""
    out.print(f"{source}: {heading(manifest)}", markup=False, style="bold")
    for section, lines in outline(manifest).items():
        out.print(f"\n{section}", style="bold cyan")
        out.print(Padding(_table(lines), (0, 0, 0, 2), expand=False))
    files = Table.grid(padding=(0, 2))
    for name, record in manifest.files.items():
        files.add_row(name, f"{record.size:,} bytes", f"sha256 {record.sha256[:12]}…")
    out.print("\nfiles", style="bold cyan")
    out.print(Padding(files, (0, 0, 0, 2), expand=False))


def _table(lines: list[Line]) -> Table:
    """The lines of a section, in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for line in lines or [Line("nothing", "")]:
        table.add_row(Text(line.field), Text(line.text))
    return table
