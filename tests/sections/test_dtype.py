"""Tests of the section `dtype`."""

from __future__ import annotations

import json
from typing import Any

import attrs
import peft
import pytest
import torch
import transformers
from torch import nn

from peftstate.sections import dtype
from peftstate.sections._table import Table
from peftstate.sections._view import ModelView
from peftstate.sections.dtype import SECTION, DtypeRecord

NORM = "model.layers.0.input_layernorm.weight"
FREQUENCIES = "model.rotary_emb.inv_freq"


def capture(model: nn.Module) -> DtypeRecord:
    """The record of a model, through JSON and back."""
    return SECTION.decode(
        json.loads(json.dumps(SECTION.encode(dtype.capture(ModelView.of(model)))))
    )


def differences(record: DtypeRecord, model: nn.Module) -> list[str]:
    """What a comparison reports."""
    return [str(mismatch) for mismatch in SECTION.compare(record, capture(model))]


def test_usual_dtype_and_exceptions_are_recorded(load_base, with_lora):
    """The base model in bf16, rotary frequencies and an autocast adapter in fp32."""
    record = capture(with_lora(load_base("bf16")))
    assert record.base.default == "bfloat16"
    # transformers 5 keeps the original frequencies in a buffer of their own
    assert set(record.base.exceptions) - {"model.rotary_emb.original_inv_freq"} == {FREQUENCIES}
    assert record.adapters == {"default": Table(default="float32", exceptions={})}


def test_quantized_weights_have_no_dtype_here(load_base):
    """How they are stored is the business of `quantization`; what is beside them is listed."""
    for kind in ("nf4", "int8"):
        record = capture(load_base(kind))
        assert record.base["lm_head.weight"] == "bfloat16"
        assert record.base.default == "bfloat16"
        assert not [name for name in record.base.exceptions if "proj.weight" in name]


def test_storage_of_a_quantized_weight_is_no_dtype(causal_lm):
    """FSDP has 4-bit weights stored as bf16, which are no numbers and must not be cast."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        causal_lm, dtype=torch.bfloat16, quantization_config=config
    )
    weight = base.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    before = weight.data.clone()
    record = attrs.evolve(capture(base), base=Table(default="float32", exceptions={}))
    dtype.prepare(record, ModelView(model=base))
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.data.view(torch.uint8), before.view(torch.uint8))
    assert base.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_kbit_preparation_is_restored_on_a_bare_base(kind, load_base):
    """What `prepare_model_for_kbit_training` cast to fp32 is fp32 again, nothing else is done."""
    prepared = peft.prepare_model_for_kbit_training(load_base(kind))
    record = capture(prepared)
    assert record.base[NORM] == "float32"
    base = load_base(kind)
    dtype.prepare(record, ModelView(model=base))
    assert differences(record, base) == []
    assert base.model.norm.weight.dtype == torch.float32
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    pairs = zip(prepared.parameters(), base.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_narrower_base_is_restored(load_base):
    """A base model that was loaded in fp32 is cast to the bf16 of the saved one."""
    record = capture(load_base("bf16"))
    base = load_base("fp32")
    assert differences(record, base)
    dtype.prepare(record, ModelView(model=base))
    assert differences(record, base) == []


def test_adapter_in_bf16_is_restored(load_base, with_lora, logits):
    """TRL casts a QLoRA adapter to bf16, PEFT loads it in fp32, which gives other logits."""
    model = with_lora(load_base("bf16"), lora_dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    record = capture(model)
    expected = logits(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert not torch.equal(logits(model), expected)
    dtype.restore(record, ModelView.of(model))
    assert differences(record, model) == []
    assert torch.equal(logits(model), expected)


def test_copy_of_a_layer_is_cast_with_the_adapter(load_base, with_lora):
    """A head in `modules_to_save` was trained in fp32, PEFT loads it in the base's bf16."""
    model = with_lora(load_base("bf16"), modules_to_save=["lm_head"])
    copy = model.base_model.model.lm_head.modules_to_save["default"]
    copy.float()
    record = capture(model)
    assert record.base["lm_head.weight"] == "bfloat16"
    copy.bfloat16()
    assert len(differences(record, model)) == 1
    dtype.restore(record, ModelView.of(model))
    assert differences(record, model) == []
    assert copy.weight.dtype == torch.float32
    assert model.base_model.model.lm_head.original_module.weight.dtype == torch.bfloat16


def test_what_narrowing_lost_is_not_made_up(load_base):
    """Rotary frequencies in bf16 are not cast to fp32: they would have other values than saved."""
    record = capture(load_base("bf16"))
    base = load_base("bf16")
    base.model.rotary_emb.inv_freq = base.model.rotary_emb.inv_freq.bfloat16()
    dtype.prepare(record, ModelView(model=base))
    (difference,) = differences(record, base)
    assert difference == f"dtype.base.exceptions[{FREQUENCIES}]: saved 'float32', found absent"


def test_narrow_frequencies_are_restored(load_base, logits):
    """Calling `model.bfloat16()` rounds the rotary frequencies, and so does a load."""
    model = load_base("fp32").bfloat16()
    record = capture(model)
    assert record.base[FREQUENCIES] == "bfloat16"
    base = load_base("bf16")
    assert not torch.equal(logits(base), logits(model))
    dtype.prepare(record, ModelView(model=base))
    assert torch.equal(base.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(base), logits(model))


def test_only_floats_are_cast(load_base):
    """A manifest that asks for integers gets an error afterwards, and no truncated weights."""
    base = load_base("bf16")
    record = attrs.evolve(capture(base), base=Table(default="int8", exceptions={}))
    before = base.model.norm.weight.clone()
    dtype.prepare(record, ModelView(model=base))
    assert torch.equal(base.model.norm.weight, before)
    assert differences(record, base)


def test_unknown_dtype_is_an_error(load_base):
    """A manifest reaches no attribute of torch but a dtype."""
    base = load_base("bf16")
    record = attrs.evolve(capture(base), base=Table(default="nn", exceptions={}))
    with pytest.raises(ValueError, match="no dtype 'nn'"):
        dtype.prepare(record, ModelView(model=base))


def test_one_adapter_can_be_restored_alone(load_base, with_lora):
    """A load into a live model touches neither the base model nor the other adapters."""
    model: Any = with_lora(load_base("bf16"))
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["second"].float()
    record = capture(model)
    model.bfloat16()
    dtype.restore_adapters(
        record.for_adapters(["second"]), ModelView.of(model).limited_to(["second"])
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["second"].weight.dtype == torch.float32
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert layer.base_layer.weight.dtype == torch.bfloat16


def test_tied_weights_stay_tied(load_base, tied_lm):
    """A cast changes the data of a parameter, not the parameter."""
    record = capture(load_base("fp32", tied_lm))
    base = load_base("bf16", tied_lm)
    dtype.prepare(record, ModelView(model=base))
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.lm_head.weight.dtype == torch.float32
