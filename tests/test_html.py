"""Manifests and reports as HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import attrs

import peftstate
from peftstate import Mismatch, Report
from peftstate._diff import ABSENT
from peftstate._html import page

GOLDEN = Path(__file__).parent / "golden" / "schema-1" / "nf4-kbit"
VOID = {"meta"}


class Checker(HTMLParser):
    """Notes tags that are not closed, whatever loads another file, and the text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.loads, self.text = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        """Note a tag and what it loads."""
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [name for name, _ in attributes if name in ("src", "href")]
        self.loads += [tag] if tag == "script" else []

    def handle_endtag(self, tag):
        """Close the tag that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Note the text."""
        self.text.append(data)


def checked(source):
    """The text of well-formed HTML that loads nothing."""
    checker = Checker(source)
    assert checker.open == []
    assert checker.loads == []
    return " ".join(checker.text)


def test_a_manifest_in_a_notebook():
    """Each section with what it says."""
    manifest = peftstate.read_manifest(GOLDEN)
    text = checked(manifest._repr_html_())
    assert all(section in text for section in manifest.sections)
    assert "bnb_4bit_quant_type nf4" in text


def test_a_report_in_a_notebook():
    """What was compared, with saved and found values where something differs, and the notes."""
    differs = Mismatch("rng", "torch_cpu.digest", "ab" * 32, "cd" * 32)
    report = Report((differs,), ("dtype", "rng"), notes=("a file more",))
    text = checked(report._repr_html_())
    for part in ("dtype ok", "rng differs", "abababababab…", "cdcdcdcdcdcd…", "a file more"):
        assert part in " ".join(text.split())


def test_a_section_that_only_one_has():
    """Where a whole section is missing, the row says so."""
    report = Report((Mismatch("tokenizer", "", {"size": 5}, ABSENT),), ("tokenizer",))
    text = checked(report._repr_html_())
    assert "the section {'size': 5} absent" in " ".join(text.split())


def test_values_are_text():
    """A value from a manifest cannot put markup on the page."""
    evil = "<script>alert(1)</script>"
    report = Report((Mismatch(evil, evil, evil, "<img src=x>"),), (evil,), notes=(evil,))
    checked(report._repr_html_())
    manifest = attrs.evolve(peftstate.read_manifest(GOLDEN), peftstate_version=evil)
    checked(page(evil, manifest._repr_html_()))


def test_a_page_stands_alone():
    """A whole document that needs no other file and knows light and dark."""
    source = page("Some adapter", peftstate.read_manifest(GOLDEN)._repr_html_())
    assert source.startswith("<!doctype html>")
    assert "color-scheme: light dark" in source
    assert "Some adapter" in checked(source)
