"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text("utf-8")
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
}


@attrs.frozen
class Block:
    """A block of code.

    Attributes:
        language: What its fence says that it is in.
        code: What is in it.
        follows: Whether nothing but an empty line is between it and the block above.
    """

    language: str
    code: str
    follows: bool


def blocks_of(page):
    """The blocks of a page, in order."""
    found = []
    end = None
    for match in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", PAGES[page], re.MULTILINE):
        follows = end is not None and not PAGES[page][end : match.start()].strip()
        language = match[2].partition(" ")[0]
        found.append(Block(language, textwrap.dedent(match[3]), follows))
        end = match.end()
    return found


def with_blocks(*languages):
    """The pages that have blocks in one of these languages."""
    return [page for page in PAGES if any(b.language in languages for b in blocks_of(page))]
