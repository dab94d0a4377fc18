"""The pictures of a save and a load: their steps are what is called, in this order."""

from __future__ import annotations

import itertools
import re

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import peftstate
from peftstate import _base_check, _injectors, _loading, _models, _saving, _storage
from tests._tokenizers import make_tokenizer
from tests.docs._pages import ROOT

SAVE = {
    "Capture every section": [(_saving, "capture_sections")],
    "PEFT writes into a staging folder": [(_saving, "_write_adapters")],
    "Describe what was written": [(_saving, "describe_written")],
    "Write the sidecar, then the manifest": [(_saving, "write_file")],
    "Sign, if a key was passed": [(_saving, "sign_staged")],
    "Force it to disk and rename the folder": [(_storage, "_seal"), (_storage, "_commit")],
    "Move the files to where PEFT has them": [(_storage, "_finish_committed")],
}
LOAD = {
    "Read the folder as one save": [(_models, "read_source")],
    "Compare the tokenizer in the folder": [(_models, "check_beside")],
    "Compare the base model": [(_base_check, "check_base")],
    "Prepare the base model": [(_loading, "prepare_base")],
    "Put the adapters in": [(_models, "wrap"), (_injectors, "readable_by_peft")],
    "Set every tensor": [(_loading, "set_tensors")],
    "Restore section by section": [(_loading, "restore_sections")],
    "Capture again, and compare with the manifest": [(_loading, "compare_restored")],
}


@pytest.fixture
def called(monkeypatch):
    """Notes which steps are taken: `called(steps)` gives the list that they are noted in."""

    def note(steps):
        noted = []
        for title, functions in steps.items():
            for module, name in functions:
                original = getattr(module, name)

                def noting(*args, _title=title, _original=original, **kwargs):
                    noted.append(_title)
                    return _original(*args, **kwargs)

                monkeypatch.setattr(module, name, noting)
        return noted

    return note


def drawn(picture):
    """The titles in a picture, in the order of their numbers."""
    text = (ROOT / "docs" / "images" / picture).read_text("utf-8")
    found = re.findall(r'class="title"[^>]*>(\d+)\. ([^<]*)<', text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [title for _, title in found]


def in_order(noted):
    """The steps that were taken, of one that was taken several times in a row the first."""
    return [title for title, _ in itertools.groupby(noted)]


def test_a_save(load_base, with_lora, called, tmp_path):
    """A signed save takes the steps in the picture."""
    model = with_lora(load_base())
    noted = called(SAVE)
    model.save_pretrained(tmp_path, sign_with=Ed25519PrivateKey.generate())
    assert in_order(noted) == drawn("save.svg")


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["placeholders", "by PEFT"])
def test_a_load(load_base, with_lora, called, tmp_path, fields):
    """A load takes the steps in the picture, whether PEFT reads the weights or not."""
    model = with_lora(load_base(), **fields).eval()
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer())
    noted = called(LOAD)
    peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert in_order(noted) == drawn("load.svg")
