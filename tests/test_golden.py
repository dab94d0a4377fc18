"""Folders that earlier releases wrote: each of them still loads, as the model that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import peftstate
from peftstate._policy import Policy
from peftstate.manifest import SCHEMA_VERSION, Manifest
from peftstate.sections import environment
from peftstate.sections._view import ModelView
from tests.golden.make import BASE, CASES, HERE, logits

pytestmark = [
    pytest.mark.filterwarnings("ignore::peftstate.errors.StateMismatchWarning"),
    pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning"),
]

FOLDERS = sorted(path for path in HERE.glob("schema-*/*") if (path / "peftstate.json").exists())
CURRENT = sorted(HERE.glob(f"schema-{SCHEMA_VERSION}/**/peftstate.json"))
TOLERANCE = {"nf4-kbit": 0.1}
"""How far logits may be off elsewhere: some processors round the scales of 4-bit weights."""


def _id(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _load(folder: Path, tokenizer: Any = None) -> Any:
    """Load a golden folder onto its base model."""
    base = CASES[folder.name].load(folder.parent / BASE)
    return peftstate.PeftModel.from_pretrained(base, folder, tokenizer=tokenizer)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a golden folder, if there is one."""
    if not (folder / "tokenizer.json").exists():
        return None
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_folders() -> None:
    """The current schema has every case."""
    current = {path.name for path in FOLDERS if path.parent.name == f"schema-{SCHEMA_VERSION}"}
    assert current == CASES.keys()


@pytest.mark.parametrize("folder", FOLDERS, ids=_id)
def test_logits(folder: Path) -> None:
    """A golden folder gives the logits it was saved with: in its environment to the last bit."""
    model = _load(folder)
    recorded = peftstate.read_manifest(folder).sections["environment"]
    expected = safetensors.torch.load_file(folder.with_suffix(".safetensors"))["logits"]
    found = logits(model)
    if recorded == environment.capture(ModelView.of(model)):
        assert torch.equal(found, expected)
    tolerance = TOLERANCE.get(folder.name, 1e-4)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("folder", FOLDERS, ids=_id)
def test_state(folder: Path) -> None:
    """A golden folder's state comes back, but for what only warns: versions, devices, hooks."""
    tokenizer = _tokenizer(folder)
    model = _load(folder, tokenizer)
    report = peftstate.verify(model, folder, tokenizer=tokenizer)
    assert {Policy.of(None).action(mismatch) for mismatch in report.mismatches} <= {"warn"}


@pytest.mark.parametrize("folder", FOLDERS, ids=_id)
def test_files(folder: Path) -> None:
    """Nobody has edited a golden folder."""
    assert peftstate.verify_files(folder).ok


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: _id(path.parent))
def test_bytes(path: Path) -> None:
    """A manifest of the current schema is written as it was read, to the last byte."""
    data = path.read_bytes()
    assert Manifest.from_json(data, path=str(path)).to_json() == data


@pytest.mark.parametrize("folder", sorted(HERE.glob("schema-*/two-adapters")), ids=_id)
def test_extra_adapter(folder: Path) -> None:
    """An extra adapter's folder is complete in itself."""
    model = _load(folder)
    assert list(model.peft_config) == ["default", "ref"]
    base = CASES[folder.name].load(folder.parent / BASE)
    alone = peftstate.PeftModel.from_pretrained(base, folder / "ref")
    model.set_adapter("ref")
    assert torch.equal(logits(alone), logits(model))
