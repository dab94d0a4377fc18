"""What PEFT's own tests found: where our classes answer as PEFT's do, and where they say more."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftstate
from peftstate.errors import BaseModelMismatchError, SaveError, StateMismatchWarning


class Net(nn.Module):
    """A model whose layer may bear another name."""

    def __init__(self, name: str = "layer") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> Any:
        """Run the layer."""
        return next(self.children())(x)


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA:UserWarning")
def test_what_peft_refuses_to_convert_is_refused_in_its_words(tmp_path):
    """An argument that PEFT does not take with a config raises PEFT's error, and leaves no file."""
    config = peft.LoraConfig(
        target_modules=["layer"],
        init_lora_weights="pissa",
        r=2,
        rank_pattern={"layer": 4},
        use_rslora=True,
    )
    model = peftstate.get_peft_model(Net(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(ValueError, match=r"`rank_pattern` or `alpha_pattern`.*`use_rslora=True`"):
        model.save_pretrained(
            tmp_path / "converted",
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["initial"]


def test_a_shard_is_refused(tmp_path):
    """A flat tensor, as FSDP has of its own part, raises, and what PEFT saves lies beside it."""
    model = peftstate.get_peft_model(Net(), peft.LoraConfig(target_modules=["layer"], r=4))
    model.get_submodule("base_model.model.layer.lora_A.default").weight.data = torch.zeros(16)
    with pytest.raises(
        SaveError, match=r"lora_A.weight' is flat: .* pass the full state_dict="
    ) as e:
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    assert e.value.rescued == str(tmp_path / "adapter.rescued-0")
    assert (tmp_path / "adapter.rescued-0" / "adapter_config.json").exists()


def test_a_flat_bias_is_not_a_shard(tmp_path):
    """Adapters have tensors of one dimension, too."""
    config = peft.LoraConfig(target_modules=["layer"], r=4, lora_bias=True, init_lora_weights=False)
    model = peftstate.get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=False)
    x = torch.randn(2, 8)
    assert torch.equal(loaded(x), model(x))


def test_key_mapping_renames_what_the_adapter_names(tmp_path):
    """On a base model whose modules got other names, `key_mapping` works once that is allowed."""
    config = peft.LoraConfig(target_modules=["layer"], r=4, init_lora_weights=False)
    model = peftstate.get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    renamed = peft.LoraConfig(target_modules=["renamed"], r=4)
    options = {
        "config": renamed,
        "key_mapping": {"layer": "renamed"},
    }
    with pytest.raises(BaseModelMismatchError):
        peftstate.PeftModel.from_pretrained(Net("renamed"), tmp_path, **options)
    with pytest.warns(StateMismatchWarning):
        loaded = peftstate.PeftModel.from_pretrained(
            Net("renamed"), tmp_path, is_trainable=False, on_mismatch="warn", **options
        )
    x = torch.randn(2, 8)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("config", "says_so"), [("PromptTuningConfig", True), ("PromptEncoderConfig", False)]
)
def test_a_prompt_is_for_inference(load_base, logits, tmp_path, config, says_so):
    """The config says so, unless the prompt's layers are there, whose result is exact."""
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    model = peftstate.get_peft_model(load_base(), getattr(peft, config)(**fields)).eval()
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, is_trainable=False)
    assert loaded.peft_config["default"].inference_mode is says_so
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / "again", is_trainable=False)
    assert torch.equal(logits(again), logits(model))
