"""What tests of several sections need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftstate.sections import _tensors


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all tensors that are digested."""
    shapes: list[tuple[int, ...]] = []
    original = vars(_tensors)["pieces_digest"]

    def counting(dtype: Any, shape: Any, pieces: Any) -> str:
        shapes.append(tuple(shape))
        digest: str = original(dtype, shape, pieces)
        return digest

    monkeypatch.setattr(_tensors, "pieces_digest", counting)
    return shapes


@pytest.fixture
def large_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Loads a Llama in bf16 whose tensors are worth being remembered."""
    import transformers

    folder: Path = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return lambda: transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
