"""Tests of the section `quantization`."""

from __future__ import annotations

import json
import random
from typing import Any

import attrs
import bitsandbytes.functional
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

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
CAN_PACK = hasattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu")
FORMS = [forms.FRESH, forms.PACKED, forms.UNPACKED] if CAN_PACK else [forms.FRESH]
"""The forms that this bitsandbytes has; whether running a layer changes its depends on the CPU."""
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
    quantization.finish(record, ModelView.of(model))


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


def linears(model: Any) -> list[Any]:
    """The 4-bit layers of a model."""
    return [module for module in model.modules() if forms.is_linear(module)]


def convert(model: Any, form: str, cycles: int = 1) -> None:
    """Bring the layers of a fresh model into a form, on any CPU."""
    for module in linears(model):
        forms.convert(module, form, cycles=cycles)


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


def test_forms_are_recorded_as_running_makes_them(load):
    """Where the CPU packs, the record says so; elsewhere a layer stays fresh."""
    model = load(**NF4)
    packs = all(forms.can_hold(module, forms.PACKED) for module in linears(model))
    use(model, forms.PACKED)
    record = capture(model)
    assert record.state.default is not None
    assert record.state.default.form == (forms.PACKED if packs else forms.FRESH)
    assert (record.scales is not None) == packs


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_was_not_restored_shows(load, form):
    """The layers of the fresh base model hold other values than the saved ones."""
    model = load(**NF4)
    convert(model, form)
    lines = compare(capture(model), load(**NF4).train())
    assert [line.split(":")[0] for line in lines] == (
        ["quantization.scales", "quantization.state.default.form"] if form != forms.FRESH else []
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_base_model_that_has_run_is_as_good_as_a_fresh_one(load, form):
    """In eval mode the first forward packs it anyway; in train mode it makes a difference."""
    record, base = capture(load(**NF4)), load(**NF4)
    convert(base, form)
    prepare(record, base)
    assert (compare(record, base.eval()) == []) == (form != forms.UNPACKED)
    assert (compare(record, base.train()) == []) == (form == forms.FRESH)


@pytest.mark.parametrize("form", FORMS)
def test_a_base_model_that_has_run_is_brought_into_the_saved_form(load, form):
    """Packed layers can be unpacked as the saved ones were."""
    model, base = load(**NF4), load(**NF4)
    convert(model, form)
    convert(base, FORMS[:2][-1])
    record = capture(model)
    prepare(record, base)
    assert compare(record, base.eval()) == []


def test_a_base_model_that_cannot_be_converted_is_left_as_it_is(load):
    """No number of rounds gives the saved scales, so the comparison has to tell."""
    model, base = load(**NF4), load(**NF4)
    convert(model, FORMS[-1])
    record = attrs.evolve(capture(model), scales="00")
    before = capture(base)
    prepare(record, base)
    assert capture(base) == before
    assert any("quantization.scales" in line for line in compare(record, base))


def without_packing(model: Any) -> Any:
    """The model as on a CPU that does not pack."""
    for module in linears(model):
        module.support_avx512bf16_for_cpu = False
    return model


def test_a_packed_model_is_loaded_where_nothing_packs(load):
    """On a GPU the layers stay fresh: a warning, not an error."""
    saved = capture(load(**NF4))
    assert saved.state.default is not None
    packed = attrs.evolve(saved.state, default=attrs.evolve(saved.state.default, form=forms.PACKED))
    record = attrs.evolve(saved, state=packed, scales="00")
    base = without_packing(load(**NF4))
    with pytest.warns(StateMismatchWarning, match="AVX512-BF16"):
        prepare(record, base)
    assert capture(base) == saved
    assert compare(record, base) == []


@pytest.mark.parametrize("form", FORMS[1:] or FORMS)
@pytest.mark.filterwarnings("ignore::peftstate.errors.StateMismatchWarning")
def test_changed_values_are_restored_where_nothing_packs(load, form):
    """What unpacking did to the values any device can hold."""
    model, expected = load(**NF4), load(**NF4)
    convert(model, form, cycles=2)
    convert(expected, FORMS[-1], cycles=1 if form == forms.PACKED else 2)
    record = capture(model)
    base = without_packing(load(**NF4))
    prepare(record, base)
    assert capture(base) == capture(expected)


def test_compute_dtype_is_restored(load):
    """It may have been set by hand, or by the first input."""
    model, base = load(**NF4), load(**NF4)
    for module in linears(model):
        module.compute_dtype, module.compute_type_is_set = torch.float32, False
    record = capture(model)
    assert compare(record, base) == [
        "quantization.state.default.compute_dtype: saved 'float32', found 'bfloat16'",
        "quantization.state.default.compute_dtype_is_set: saved False, found True",
    ]
    prepare(record, base)
    assert compare(record, base) == []


@pytest.mark.parametrize("keywords", [{}, INT8])
def test_what_cannot_be_restored_is_left_to_the_comparison(load, keywords):
    """On another quantization nothing is set."""
    base = load(**keywords)
    before = capture(base)
    prepare(capture(load(**NF4)), base)
    assert capture(base) == before


def test_restored_fields_are_fields():
    """They are named for the check that is made before the base model is touched."""
    assert SECTION.checked_on_base
    assert SECTION.restored <= {field.name for field in attrs.fields(QuantizationRecord)}


# What a base model is rebuilt with


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        NF4,
        INT8 | {"llm_int8_threshold": 3.0},
        {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "up_proj"]},
        NF4 | {"bnb_4bit_quant_storage": torch.bfloat16},
    ],
)
def test_the_base_model_is_rebuilt_as_it_was_quantized(load, checkpoint, keywords):
    """What is handed to `from_pretrained` gives the same layers."""
    record = capture(load(**keywords))
    arguments = quantization.quantization_kwargs(record)
    assert set(arguments) == ({"quantization_config"} if keywords else set())
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, **arguments)
    assert capture(base) == record


def test_a_prequantized_checkpoint_brings_its_own_config(load):
    """Another one would be ignored or refused by transformers."""
    record = attrs.evolve(capture(load(**NF4)), pre_quantized=True)
    assert quantization.quantization_kwargs(record) == {}


@pytest.mark.parametrize("method", ["hqq", "torchao"])
def test_other_methods_are_not_rebuilt(load, method):
    """Their configs would have to be made from what a manifest says; the caller has to."""
    record = attrs.evolve(capture(load()), method=method, config={"quant_method": method})
    with pytest.raises(ValueError, match=f"'{method}'.*pass quantization_config="):
        quantization.quantization_kwargs(record)


def test_layers_that_were_replaced_by_hand_are_not_rebuilt(load):
    """Nothing says how."""
    record = attrs.evolve(capture(load(**NF4)), config=None)
    with pytest.raises(ValueError, match="pass quantization_config="):
        quantization.quantization_kwargs(record)
