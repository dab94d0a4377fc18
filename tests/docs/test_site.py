"""The site of the documentation: what is in it, and what `make docs` refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.docs._pages import ROOT

pytest.importorskip("mkdocs", reason="the oldest environment builds no site")


def build(root, site):
    """Build the site of a repository as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    config = ["--config-file", str(root / "docs" / "site" / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "true"}
    return subprocess.run(
        [*command, *config], check=False, capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(site):
    """Pages load their styles, scripts, fonts and pictures from beside them."""
    pages = [page.read_text("utf-8") for page in site.rglob("*.html")]
    loads = r"<(?:script|img|iframe)[^>]*\ssrc=\"([^\"]*)\"|<link[^>]*\shref=\"([^\"]*)\""
    found = {first or second for page in pages for first, second in re.findall(loads, page)}
    assert found
    assert not [path for path in found if re.match(r"(?:https?:)?//", path)]
    styles = [style.read_text("utf-8") for style in site.rglob("*.css")]
    assert not re.findall(r"(?:@import|url\()[\"' ]*(?:https?:)?//", "".join(styles))


def test_pages_of_the_repository_are_in_it(site):
    """Those at its top, and examples, with their links led to where they are on the site."""
    contributing = (site / "CONTRIBUTING.html").read_text("utf-8")
    assert 'href="sections.html"' in contributing
    assert 'href="SECURITY.html"' in contributing
    assert (site / "examples" / "serve_fastapi.py").exists()
    assert not (site / "fields.py").exists()


def test_search_finds_an_error(site):
    """The index of the search has the headings."""
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    assert "errors.html#integrityerror" in {document["location"] for document in index["docs"]}


@pytest.fixture
def copy(tmp_path):
    """A copy of what the site is made of."""
    without = shutil.ignore_patterns("__pycache__")
    for folder in ("docs", "examples", "src"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without)
    for page in ROOT.glob("*.md"):
        shutil.copy(page, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](missing.md)", "missing.md"),
        ("[a](hub.md#missing)", "missing"),
        ("::: peftstate.missing", "peftstate.missing"),
    ],
)
def test_what_leads_nowhere_is_refused(copy, text, complaint):
    """A link, an anchor or a name that is not there fails the build."""
    page = copy / "docs" / "quickstart.md"
    page.write_text(f"{page.read_text('utf-8')}\n{text}\n", "utf-8")
    result = build(copy, copy / "site")
    assert result.returncode != 0
    assert complaint in result.stderr


def test_every_page_is_in_the_navigation(copy):
    """A page that nobody can get to fails the build."""
    (copy / "docs" / "lost.md").write_text("# Lost\n", "utf-8")
    result = build(copy, copy / "site")
    assert result.returncode != 0
    assert "lost.md" in result.stderr
