"""What peftstate promises, on a real Gemma, in the flow of TRL's `SFTTrainer`."""

from __future__ import annotations

import attrs
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peftstate
from peftstate._demo import flow
from peftstate._demo.measure import Answer, State
from peftstate.errors import BaseModelMismatchError, QuantizationMismatchError

pytestmark = pytest.mark.slow

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
OTHER_QUANTIZATIONS = {
    "fp4": BitsAndBytesConfig(**NF4 | {"bnb_4bit_quant_type": "fp4"}),
    "no double quantization": BitsAndBytesConfig(**NF4 | {"bnb_4bit_use_double_quant": False}),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "unquantized": None,
}


def test_logits_are_the_same_to_the_last_bit(comparison):
    """A reloaded model computes the logits of the model that was saved."""
    assert comparison.logit_difference == 0.0


def test_sampled_text_is_the_same(comparison):
    """A reloaded model samples the text of the model that was saved, from the same seed."""
    assert comparison.same_text


@pytest.mark.parametrize("state", [field.name for field in attrs.fields(State)])
def test_state_is_kept(comparison, state):
    """A reload brings back the next random numbers, the generation config and all other state."""
    assert comparison.kept[state]


def test_trainer_checkpoint_has_a_manifest(trained):
    """A checkpoint that the trainer wrote by itself holds the state, too."""
    assert (trained.saved.adapter / "checkpoint-3" / "peftstate.json").is_file()


@pytest.mark.parametrize("quantization", OTHER_QUANTIZATIONS)
def test_base_quantized_otherwise_is_refused(trained, quantization):
    """A base model that is quantized in another way, or not at all, is an error."""
    base = AutoModelForCausalLM.from_pretrained(
        trained.saved.checkpoint,
        quantization_config=OTHER_QUANTIZATIONS[quantization],
        dtype=torch.bfloat16,
    )

    with pytest.raises(QuantizationMismatchError):
        peftstate.PeftModel.from_pretrained(base, trained.saved.adapter)


@pytest.mark.parametrize(
    "name", ["model.layers.0.input_layernorm.weight", "model.layers.17.mlp.down_proj.weight"]
)
def test_base_with_a_changed_weight_is_refused(trained, name):
    """One bit of one weight of the base model is enough, and the error names the weight."""
    base = flow.load_base(trained.saved.checkpoint)
    base.get_parameter(name).data.view(torch.uint8).flatten()[0] ^= 1

    with pytest.raises(BaseModelMismatchError, match=name) as error:
        peftstate.PeftModel.from_pretrained(base, trained.saved.adapter)

    assert [name in mismatch.field for mismatch in error.value.mismatches] == [True]


def test_saving_leaves_the_live_model_alone(trained, tmp_path):
    """A save moves no logit of a 4-bit model that has generated, which plain PEFT's save does."""
    model, saved = trained.trainer.model, trained.saved

    model.save_pretrained(tmp_path)

    after = Answer.of(model, saved.tokenizer, flow.PROMPT, saved.random_state)
    assert torch.equal(after.logits, saved.answer.logits)
    assert after.text == saved.answer.text


def test_model_that_has_generated_comes_back(trained, tmp_path):
    """A 4-bit model that has run before the save is reloaded just as exactly."""
    trained.trainer.model.save_pretrained(tmp_path)

    found = flow.reload(flow.RELOADS[2], attrs.evolve(trained.saved, adapter=tmp_path))

    assert found.logit_difference == 0.0
    assert found.same_text


def test_plain_peft_loads_the_folder(trained):
    """To plain PEFT the folder is an ordinary adapter: it finds every tensor, and its values."""
    model = peft.PeftModel.from_pretrained(
        flow.load_base(trained.saved.checkpoint), trained.saved.adapter
    )

    found = peft.get_peft_model_state_dict(model)
    saved = peft.get_peft_model_state_dict(trained.trainer.model)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key].float()) for key in saved)
