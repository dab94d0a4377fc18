"""What docs/hub.md shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import peftstate
from tests._tokenizers import make_tokenizer
from tests.hub.test_adapters import logits, with_adapters

PAGE = (Path(__file__).parents[2] / "docs" / "hub.md").read_text("utf-8")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning"),
]


def test_the_page(load_base, hub, client, tmp_path, monkeypatch):
    """Its code pushes, pulls and verifies."""
    monkeypatch.chdir(tmp_path)
    key = Ed25519PrivateKey.generate()
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    Path("key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    model = with_adapters(load_base("bf16"), "default")
    names = {name: getattr(peftstate, name) for name in peftstate.__all__}
    names |= {"peftstate": peftstate, "tokenizer": make_tokenizer()}
    names |= {"model": model, "base": load_base("bf16")}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)  # noqa: S102 - the page's own code
    assert torch.equal(logits(names["model"]), logits(model))
    assert names["report"].ok
    assert peftstate.verify_signature("user/adapter", [key.public_key()])
    assert "predictions" in names["manifest"].sections
