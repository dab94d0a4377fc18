"""A base model that brings its own code, as `trust_remote_code` loads it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import dynamic_module_utils

from benchmarks.fidelity._models import Make, Place

_CODE = """
import torch
from transformers import LlamaForCausalLM


class CappedForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = {cap} * torch.tanh(output.logits / {cap})
        return output
"""


def remote_model(*, cap: int) -> Make:
    """Loads a Llama whose own code caps its logits."""

    def load(place: Place) -> Any:
        folder = place.root / "capped"
        if not folder.exists():
            shutil.copytree(place.checkpoint(), folder)
            config = json.loads((folder / "config.json").read_text())
            config["auto_map"] = {"AutoModelForCausalLM": "modeling_capped.CappedForCausalLM"}
            (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_capped.py").write_text(_CODE.format(cap=cap))
        with _own_modules(place.root / "modules"):
            return place.load(checkpoint=folder, trust_remote_code=True)

    return load


@contextmanager
def _own_modules(folder: Path) -> Iterator[None]:
    """Have transformers copy remote code to a folder of ours, and forget it afterwards."""
    path = list(sys.path)
    with mock.patch.object(dynamic_module_utils, "HF_MODULES_CACHE", str(folder)):
        try:
            yield
        finally:
            sys.path[:] = path
