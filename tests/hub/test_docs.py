"""What docs/hub.md shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import pytest
import torch

import peftstate
from tests.hub.test_adapters import logits, with_adapters

PAGE = (Path(__file__).parents[2] / "docs" / "hub.md").read_text("utf-8")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning"),
]


def test_the_page(load_base, hub, client, tmp_path, monkeypatch):
    """Its code pushes, pulls and verifies."""
    monkeypatch.chdir(tmp_path)
    api = huggingface_hub.HfApi(endpoint=hub.endpoint)
    monkeypatch.setattr(huggingface_hub, "upload_folder", api.upload_folder)
    model = with_adapters(load_base("bf16"), "default")
    names = {name: getattr(peftstate, name) for name in peftstate.__all__}
    names |= {"peftstate": peftstate, "huggingface_hub": huggingface_hub}
    names |= {"model": model, "base": load_base("bf16")}
    push, upload, pull = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in (push, upload, pull):
        exec(block, names)  # noqa: S102 - the page's own code
    assert torch.equal(logits(names["model"]), logits(model))
    assert names["report"].ok
    assert "predictions" in names["manifest"].sections
