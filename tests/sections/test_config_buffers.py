"""Buffers that the config gives come back as they are where something wrote to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftstate
from peftstate.sections._config_buffers import is_rounded

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")

FREQUENCIES = "model.rotary_emb.inv_freq"


def extra(folder: Path) -> set[str]:
    """The names of the tensors of the base model that are in the sidecar of a folder."""
    return set(peftstate.read_manifest(folder).sections["extra_tensors"].base)


def there_and_back(model: Any) -> Any:
    """Round all of a model to fp16, RoPE's frequencies among it, and make it fp32 again."""
    return model.half().float()


ROUNDED: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "before it was wrapped": lambda base, wrap: wrap(there_and_back(base)),
    "afterwards": lambda base, wrap: there_and_back(wrap(base)),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_frequencies(load_base, with_lora, logits, tmp_path, name):
    """They come back, over and over; the dtype alone does not tell what a cast has lost."""
    model = ROUNDED[name](load_base(), with_lora).eval()
    expected = logits(model)
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        assert FREQUENCIES in extra(tmp_path / generation)
        model = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / generation)
        assert torch.equal(logits(model), expected)


def test_frequencies_that_were_edited(load_base, with_lora, logits, tmp_path):
    """As some stretch a model's context by hand."""
    model = with_lora(load_base()).eval()
    model.get_submodule("base_model.model.model.rotary_emb").inv_freq /= 3
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert extra(tmp_path) == {FREQUENCIES}
    assert torch.equal(logits(peftstate.PeftModel.from_pretrained(load_base(), tmp_path)), expected)


def test_what_the_config_gives_is_not_saved(load_base, with_lora, tmp_path):
    """Nor is it in a later generation, or one in a narrower dtype that was loaded so."""
    model = with_lora(load_base("bf16"))
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        assert extra(tmp_path / generation) == set()
        model = peftstate.PeftModel.from_pretrained(load_base("bf16"), tmp_path / generation)


def test_frequencies_that_follow_the_input(with_lora, tmp_path):
    """A dynamic RoPE fits them to what it is run on, and back, by more than its buffers."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = with_lora(base).eval()
    before = base.model.rotary_emb.inv_freq.clone()
    model(input_ids=torch.arange(16)[None])
    assert not torch.equal(base.model.rotary_emb.inv_freq, before)
    model.save_pretrained(tmp_path / "adapter")
    assert extra(tmp_path / "adapter") == set()


def test_caches_that_a_model_fills(load_base, with_lora, tmp_path):
    """A buffer that is there since the model was wrapped, or has grown, is none of the config's."""
    base = load_base()
    base.register_buffer("grown", torch.zeros(2), persistent=False)
    model = with_lora(base)
    base.grown = torch.full((3,), 0.3)
    base.register_buffer("new", torch.full((3,), 0.3), persistent=False)
    base.register_buffer("rounded", torch.full((3,), 0.75), persistent=False)
    model.save_pretrained(tmp_path)
    assert extra(tmp_path) == set()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([1, 0.7]).bfloat16().float(), True),
        (torch.tensor([1, 0.7]).half().double(), True),
        (torch.tensor([1, 0.7]), False),
        (torch.tensor([1, 0.7]).bfloat16(), False),  # which its dtype says
        (torch.tensor([0, 3, 0.25, -2, float("inf")]), False),  # as scales and masks have them
        (torch.tensor([float("nan"), 0.75]), False),
        (torch.tensor([]), False),
    ],
)
def test_what_a_narrower_dtype_has_left(values, expected):
    """Values that bf16 or fp16 hold, and that are not so round that they were meant."""
    assert is_rounded(values) is expected
