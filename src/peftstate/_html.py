"""Manifests and reports as HTML: for notebooks, and for pages that need no other file."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from peftstate._diagnosis import figures
from peftstate._diff import Mismatch, printable, shown
from peftstate._outline import heading, outline

if TYPE_CHECKING:
    from peftstate._diagnosis import Diagnosis
    from peftstate._report import Report
    from peftstate.manifest import Manifest

_STYLE = """
.peftstate { font: 14px/1.45 system-ui, sans-serif; max-width: 60rem; }
.peftstate summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
.peftstate .wide { overflow-x: auto; }
.peftstate table { border-collapse: collapse; margin: .25rem 0 .75rem 1rem; }
.peftstate th, .peftstate td { text-align: left; vertical-align: top; overflow-wrap: anywhere;
  min-width: 7.5em; padding: .15rem .6rem .15rem 0; }
.peftstate th { font-weight: 400; opacity: .7; }
.peftstate .differs { color: #b3261e; }
.peftstate .ok { color: #1b6e3c; }
@media (prefers-color-scheme: dark) {
  .peftstate .differs { color: #f2b8b5; }
  .peftstate .ok { color: #7fd6a0; }
}
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 62rem; }}
h1, h2 {{ line-height: 1.25; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def manifest_html(manifest: Manifest, *, is_open: bool = False) -> str:
    """The outline of a manifest, a fold-out for each section, all of them shut or open."""
    parts = [f"<p>{escape(heading(manifest)).capitalize()}.</p>"]
    for section, lines in outline(manifest).items():
        rows = ((line.field, line.text) for line in lines)
        body = _table(rows) if lines else "<p>nothing</p>"
        parts.append(_section(section, body, is_open=is_open))
    files = (
        (name, f"{record.size:,} bytes, sha256 {record.sha256}")
        for name, record in manifest.files.items()
    )
    parts.append(_section("files", _table(files), is_open=is_open))
    return _styled(parts)


def report_html(report: Report) -> str:
    """What was compared and what differs, a fold-out for each section that differs."""
    parts = []
    for section in report.sections:
        mismatches = report.of(section).mismatches
        if mismatches:
            head = f"{escape(section)} <span class='differs'>differs</span>"
            parts.append(_section(head, _mismatches(mismatches), is_open=True))
        else:
            parts.append(f"<div>{escape(section)} <span class='ok'>ok</span></div>")
    parts += [f"<p>Note: {escape(note)}</p>" for note in report.notes]
    return _styled(parts)


def diagnosis_html(diagnosis: Diagnosis) -> str:
    """A diagnosis: the verdict, a row for each cause, and what to do about it."""
    head = ("", "section", "saved", "found", "max |Δ logits|", "KL (nats)", "top-1", "what to do")
    named = [(cause, cause.effect, cause.remedy) for cause in diagnosis.causes]
    rows = [
        (cause.name, cause.section, cause.saved, cause.found, *figures(effect), remedy)
        for cause, effect, remedy in named
    ]
    rows.append(("all together", "", "", "", *figures(diagnosis.total), ""))
    parts = [f"<p>{escape(diagnosis.verdict)}</p>", _table(rows, head=head)]
    others = ((cause.name, cause.note) for cause in diagnosis.unmeasured)
    if diagnosis.unmeasured:
        parts.append(_section("differs too", _table(others)))
    return _styled(parts)


def page(title: str, body: str) -> str:
    """A page of its own around what the functions above give."""
    return _PAGE.format(title=escape(title), body=body)


def _mismatches(mismatches: Iterable[Mismatch]) -> str:
    """The differences of a section: field, saved value, found value."""
    rows = (
        (printable(each.field) or "the section", shown(each.saved), shown(each.found))
        for each in mismatches
    )
    return _table(rows, head=("field", "saved", "found"))


def _section(head: str, body: str, *, is_open: bool = False) -> str:
    """A fold-out; its head is HTML."""
    attribute = " open" if is_open else ""
    return f"<details{attribute}><summary>{head}</summary>{body}</details>"


def _table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """A table whose first column names what the others tell."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)] if head else []
    for name, *values in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f"<th>{escape(name)}</th>{cells}")
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='wide'><table>{body}</table></div>"


def _styled(parts: Iterable[str]) -> str:
    """A block that brings its style along."""
    return f"<style>{_STYLE}</style><div class='peftstate'>{''.join(parts)}</div>"
