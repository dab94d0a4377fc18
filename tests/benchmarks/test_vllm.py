"""The checks of a real vLLM: what the page holds of the last run, and what is said without vLLM."""

from __future__ import annotations

from benchmarks._page import DOCS
from benchmarks.vllm import REFUSALS, main


def test_skipped_without_vllm(monkeypatch, capsys):
    """Without an environment of vLLM nothing is checked, and that is what it says."""
    monkeypatch.delenv("PEFTSTATE_VLLM_PYTHON", raising=False)
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("SKIPPED: there is no vLLM")


def test_page():
    """The page holds a run in which every refusal was tried and nothing failed."""
    page = (DOCS / "vllm.md").read_text(encoding="utf-8")
    table = page.partition("<!-- begin: vllm -->")[2].partition("<!-- end: vllm -->")[0]
    assert all(refusal.what in table for refusal in REFUSALS)
    assert " checks, 0 not as promised." in table
