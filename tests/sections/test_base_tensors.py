"""Tests of which tensors stand for a base model."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftstate
from peftstate.errors import BaseModelMismatchError
from peftstate.sections._base_tensors import base_tensors
from peftstate.sections._view import ModelView

parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")  # newer than the oldest release


class Experts(nn.Module):
    """A parameter that is no layer's weight, as fused experts are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(64, 64)
        self.experts = nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use both."""
        output: torch.Tensor = self.project(x) @ self.experts.sum(0)
        return output


def quantized() -> Any:
    """The same with that parameter in 4 bits."""
    model = Experts()
    parametrize.replace_parameter_4bit(model, "experts", quant_type="nf4")
    return model


def state_of(model: nn.Module) -> Any:
    """The quantization state of the parameter."""
    return model.get_submodule("parametrizations.experts.0").quant_state


def test_the_scales_of_a_parameter_are_among_them():
    """They are no tensors of a module; the nibbles are."""
    names = set(base_tensors(ModelView.of(quantized())))
    assert {
        "parametrizations.experts.original",
        "parametrizations.experts.0.quant_state.absmax",
        "parametrizations.experts.0.quant_state.shape",
    } <= names


def test_other_scales_are_another_base_model(tmp_path):
    """A parameter with the same nibbles and another scale is refused."""
    config = peft.LoraConfig(target_modules=["project"], init_lora_weights=False)
    model = peftstate.get_peft_model(quantized(), config).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 64)
    loaded = peftstate.PeftModel.from_pretrained(quantized(), tmp_path, is_trainable=False)
    assert torch.equal(loaded(x), model(x))
    other = quantized()
    state_of(other).absmax.mul_(1.5)
    with pytest.raises(BaseModelMismatchError, match=r"quant_state\.absmax"):
        peftstate.PeftModel.from_pretrained(other, tmp_path)
