"""Tests of the section `quantization`."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import attrs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peftstate import _codec
from peftstate.errors import QuantizationMismatchError, StateMismatchWarning
from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections import quantization
from peftstate.sections._view import ModelView
from peftstate.sections.quantization import SECTION, QuantizationRecord

BLOCK = "model.layers.*"
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
INT8 = {"load_in_8bit": True}
INPUTS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama on disk, of dimensions that bitsandbytes packs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def load(checkpoint):
    """Loads the base model, quantized as the keywords of `BitsAndBytesConfig` say."""

    def load(dtype: torch.dtype = torch.bfloat16, **keywords: Any) -> Any:
        config = BitsAndBytesConfig(**keywords) if keywords else None
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, quantization_config=config
        )

    return load


def capture(model: nn.Module) -> QuantizationRecord:
    """The record of a model, bare or wrapped, through JSON and back."""
    record = quantization.capture(ModelView.of(model))
    return SECTION.decode(json.loads(json.dumps(SECTION.encode(record))))


def prepare(record: QuantizationRecord, model: nn.Module) -> None:
    """Restore a record on a bare base model."""
    quantization.prepare(record, ModelView.of(model))


def compare(record: QuantizationRecord, model: nn.Module) -> list[str]:
    """What a load reports: the differences of a live model."""
    found = quantization.capture_like(ModelView.of(model), record)
    return [str(mismatch) for mismatch in SECTION.compare(record, found)]


def with_lora(base: Any, *, seed: int = 1) -> Any:
    """The base model with an adapter that does something."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0
    )
    return get_peft_model(base, config)


def logits(model: Any) -> torch.Tensor:
    """The logits of the model in its mode."""
    with torch.no_grad():
        output: torch.Tensor = model(INPUTS).logits
    return output


def linears(model: Any) -> dict[str, nn.Module]:
    """The 4-bit layers of a model."""
    return {name: module for name, module in model.named_modules() if forms.is_linear(module)}


def use(model: Any, form: str) -> None:
    """Do to a model what brings its layers into a form, on a CPU that packs."""
    model.eval()
    if form != forms.FRESH:
        logits(model)
    if form == forms.UNPACKED:
        model.state_dict()


# What is recorded


def test_record_of_a_4bit_model(load):
    """Config, layers and their settings are there, in few lines."""
    record = capture(load(**NF4))
    assert record.method == "bitsandbytes"
    assert record.pre_quantized is False
    assert record.config is not None
    assert record.config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert "_load_in_4bit" not in record.config
    assert record.modules == {
        f"{BLOCK}.{name}": "0-1"
        for name in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }
    assert record.layers.default is not None
    assert attrs.asdict(record.layers.default) == {
        "kind": "Linear4bit",
        "quant_type": "nf4",
        "blocksize": 64,
        "double_quant": True,
        "dtype": "bfloat16",
        "threshold": None,
        "has_fp16_weights": None,
    }
    assert record.layers.exceptions == {}
    assert record.scales is None


def test_record_of_a_model_that_is_not_quantized(load):
    """There is no method, and no layer."""
    record = capture(load())
    assert (record.method, record.config, record.modules) == (None, None, {})
    assert record.layers.default is None


@pytest.mark.parametrize("keywords", [NF4, INT8])
def test_record_of_a_prequantized_checkpoint(load, tmp_path, keywords):
    """A checkpoint that carries its quantization gives the same layers, and is marked."""
    load(**keywords).save_pretrained(tmp_path)
    record = capture(load(**keywords))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert capture(model).pre_quantized
    assert compare(record, model) == []


@pytest.mark.parametrize("keywords", [{}, NF4, INT8])
def test_a_wrapped_model_gives_the_record_of_its_base(load, keywords):
    """Adapters are looked through, whichever layers they are on."""
    record = capture(load(**keywords))
    assert capture(with_lora(load(**keywords))) == record


@pytest.mark.parametrize("keywords", [NF4, INT8])
def test_capture_changes_nothing(load, keywords):
    """Neither the layers nor the random generators; the model may have run."""
    model = load(**keywords)
    logits(model)
    before = capture(model)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    assert capture(model) == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_layers_without_a_config_are_recorded(load):
    """What counts is the live model: somebody may have replaced the layers by hand."""
    model = load(**NF4)
    record = capture(model)
    del model.config.quantization_config, model.hf_quantizer
    assert capture(model).method == "bitsandbytes"
    assert compare(record, model) == []


def test_a_config_without_layers_is_no_quantization(load):
    """A config may outlive what it says."""
    model = load()
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    assert capture(model).method is None
    assert compare(capture(load()), model) == []


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        ([], {}),
        (["head"], {"head": "present"}),
        (["a.0", "a.1", "a.3"], {"a.*": "0-1,3"}),
        (["a.10", "a.9"], {"a.*": "9-10"}),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], {"a.*.b.*": "0-1.0-1"}),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], {"a.*.b.*": "(0.0-1) (1.0)"}),
        (["a.01", "a.1"], {"a.01": "present", "a.*": "1"}),
    ],
)
def test_module_names_are_drawn_together(names, lines):
    """A model of hundreds of layers is a few lines, in which each layer still counts."""
    assert quantization._numbered(names) == lines


def test_other_sets_of_names_give_other_lines():
    """No two sets of layers look the same."""
    generator = random.Random(0)
    names = [f"a.{i}.b.{j}.c.{k}" for i in range(3) for j in range(3) for k in range(3)]
    seen: dict[str, set[str]] = {}
    for _ in range(2000):
        chosen = set(generator.sample(names, generator.randint(1, len(names))))
        lines = json.dumps(quantization._numbered(chosen), sort_keys=True)
        assert seen.setdefault(lines, chosen) == chosen


# What differs


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        (
            NF4 | {"bnb_4bit_quant_type": "fp4"},
            ["quantization.layers.default.quant_type: saved 'nf4', found 'fp4'"],
        ),
        (
            NF4 | {"bnb_4bit_use_double_quant": False},
            ["quantization.layers.default.double_quant: saved True, found False"],
        ),
        (
            NF4 | {"dtype": torch.float16},
            ["quantization.layers.default.dtype: saved 'bfloat16', found 'float16'"],
        ),
        (
            NF4 | {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp.up_proj"]},
            [f"quantization.modules[{BLOCK}.mlp.up_proj]: saved '0-1', found '0'"],
        ),
        (
            INT8,
            [
                "quantization.layers.default.blocksize: saved 64, found None",
                "quantization.layers.default.double_quant: saved True, found None",
                "quantization.layers.default.dtype: saved 'bfloat16', found None",
                "quantization.layers.default.has_fp16_weights: saved None, found False",
                "quantization.layers.default.kind: saved 'Linear4bit', found 'Linear8bitLt'",
                "quantization.layers.default.quant_type: saved 'nf4', found None",
                "quantization.layers.default.threshold: saved None, found 6.0",
            ],
        ),
    ],
)
def test_another_quantization_shows(load, keywords, expected):
    """A difference of the whole model is a line or a few, not one for each layer."""
    found = [
        line for line in compare(capture(load(**NF4)), load(**keywords)) if ".state." not in line
    ]
    assert found == expected


def test_another_threshold_shows(load):
    """So does a threshold that was set on the live layers only."""
    record = capture(load(**INT8))
    expected = ["quantization.layers.default.threshold: saved 6.0, found 3.0"]
    assert compare(record, load(**INT8, llm_int8_threshold=3.0)) == expected
    model = load(**INT8)
    for module in model.modules():
        if hasattr(module, "state"):
            module.state.threshold = 3.0
    assert compare(record, model) == expected


def test_a_base_model_that_is_not_quantized_shows(load):
    """The method, the settings and each kind of layer are named."""
    lines = compare(capture(load(**NF4)), load())
    assert "quantization.method: saved 'bitsandbytes', found None" in lines
    assert f"quantization.modules[{BLOCK}.mlp.up_proj]: saved '0-1', found absent" in lines
    assert len(lines) == 10
    assert SECTION.error is QuantizationMismatchError


def test_a_quantization_that_was_not_saved_shows(load):
    """Also the other way round."""
    lines = compare(capture(load()), load(**INT8))
    assert "quantization.method: saved None, found 'bitsandbytes'" in lines


@pytest.mark.parametrize(
    "keywords",
    [
        {"bnb_4bit_quant_storage": torch.bfloat16},
        {"llm_int8_threshold": 3.0},
        {"llm_int8_skip_modules": ["lm_head"]},
    ],
)
def test_a_config_that_gives_the_same_layers_is_no_difference(load, keywords):
    """Of bitsandbytes the outcome is compared, not what was asked for."""
    model = load(**NF4, **keywords)
    assert compare(capture(load(**NF4)), model) == []


def test_the_config_of_other_methods_is_compared(load):
    """No layers of theirs are known, so their config has to tell."""
    model = load()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    record = capture(model)
    assert compare(record, model) == []
    model.config.quantization_config = {"quant_method": "gptq", "bits": 3}
    assert compare(record, model) == ["quantization.config.bits: saved 4, found 3"]


# What is restored


@pytest.mark.parametrize("keywords", [{}, NF4, INT8, NF4 | {"bnb_4bit_use_double_quant": False}])
@pytest.mark.parametrize("form", [forms.FRESH, forms.PACKED, forms.UNPACKED])
def test_logits_are_restored_bit_for_bit(load, keywords, form):
    """In train mode and in eval mode, whatever running the saved model did to its layers."""
    model = with_lora(load(**keywords))
    use(model, form)
    record = capture(model)
    expected = [logits(model.train()), logits(model.eval())]

    base = load(**keywords)
    prepare(record, base)
    loaded = with_lora(base)
    assert compare(record, loaded.train()) == []
    assert capture(loaded) == record
    for found, saved in zip([logits(loaded.train()), logits(loaded.eval())], expected, strict=True):
        assert torch.equal(found, saved)


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_layers_that_went_around_several_times_are_restored(load, rounds, nested):
    """Trainers evaluate and save each epoch; how often that was is found out by the scales."""
    keywords = NF4 | {"bnb_4bit_use_double_quant": nested}
    model = with_lora(load(**keywords))
    for _ in range(rounds):
        use(model, forms.UNPACKED)
    record = capture(model)
    expected = [logits(model.train()), logits(model.eval())]
    base = load(**keywords)
    prepare(record, base)
    loaded = with_lora(base)
    assert torch.equal(logits(loaded.train()), expected[0])
    assert torch.equal(logits(loaded.eval()), expected[1])


def can_pack(model: Any) -> bool:
    """Whether running the model packs it."""
    return all(forms.can_hold(module, forms.PACKED) for module in linears(model).values())


def test_forms_are_recorded_as_running_makes_them(load):
    """Where the CPU packs, the record says so; elsewhere a layer stays fresh."""
    model = load(**NF4)
    use(model, forms.PACKED)
    record = capture(model)
    assert record.state.default is not None
    assert record.state.default.form == (forms.PACKED if can_pack(model) else forms.FRESH)
    assert (record.scales is not None) == can_pack(model)
