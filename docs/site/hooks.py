"""What the site takes from outside of `docs/`: the project's own pages, and the examples."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/*.py")
"""Files of the repository that the site has, too, under their own names."""
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:]+)(?=[)#])")
"""The path in a link to a file of this repository, as Markdown has it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files, as they lie in the repository, into links as the site has them."""
    places = {file.abs_src_path: file.src_uri for file in files}
    here = str(page.file.abs_src_path)

    def in_site(link: re.Match[str]) -> str:
        path = os.path.normpath(Path(here).parent / link["path"])
        place = places.get(path)
        return link["path"] if place is None else _relative(place, places[here])

    return _LINK.sub(in_site, markdown)


def _relative(place: str, page: str) -> str:
    """The way from a page to another file of the site."""
    return Path(os.path.relpath(place, Path(page).parent)).as_posix()
