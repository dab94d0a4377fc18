"""Tests of the section `predictions`."""

from __future__ import annotations

import math
import random
import types
from typing import Any

import attrs
import numpy as np
import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn

import peftstate
from peftstate.errors import PredictionMismatchError, SaveError
from peftstate.sections import _platform, predictions, quantization
from peftstate.sections._probe import LENGTH, predict, probe_inputs
from peftstate.sections._view import ModelView
from peftstate.sections.predictions import SECTION
from tests._tokenizers import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")

IDS = torch.arange(4, 16).reshape(2, 6)
NEXT_UP = 1 + 2.0**-23


def view(model: Any, ids: torch.Tensor = IDS) -> ModelView:
    """A view with inputs to predict on."""
    return attrs.evolve(ModelView.of(model), probe={"input_ids": ids})


def mismatches(record: Any, model: Any) -> dict[str, Any]:
    """What differs from a record: field to value found."""
    found = SECTION.compare(record, SECTION.capture_like(view(model), record))
    return {mismatch.field: mismatch.found for mismatch in found}


@pytest.fixture
def model(load_base, with_lora):
    """A model in train mode, with dropout."""
    return with_lora(load_base()).train()


@pytest.fixture
def elsewhere(monkeypatch):
    """Has the process be in another environment than before."""
    return lambda: monkeypatch.setattr(_platform, "key", lambda kinds: f"elsewhere: {kinds}")


# Inputs


def test_synthetic_inputs_are_fixed_and_hold_no_special_token(load_base):
    """``True`` stands for the same row of ids each time, all of the vocabulary, none of a role."""
    base = load_base()
    first, second = (probe_inputs(probe=True, base=base) for _ in range(2))
    assert first.keys() == {"input_ids"}
    assert torch.equal(first["input_ids"], second["input_ids"])
    ids = first["input_ids"].flatten().tolist()
    assert first["input_ids"].shape == (1, LENGTH)
    assert len(set(ids)) == LENGTH
    assert not {base.config.pad_token_id, base.config.bos_token_id, base.config.eos_token_id} & {
        *ids
    }
    assert max(ids) < base.config.vocab_size


def test_synthetic_inputs_of_a_tiny_vocabulary_are_in_it():
    """Ids repeat before they leave the vocabulary."""
    config = types.SimpleNamespace(vocab_size=3, pad_token_id=0)
    ids = probe_inputs(probe=True, base=types.SimpleNamespace(config=config))["input_ids"]
    assert set(ids.flatten().tolist()) == {1, 2}


def test_synthetic_inputs_of_an_encoder_and_decoder_are_for_both():
    """T5 is given the decoder's ids, too."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    inputs = probe_inputs(probe=True, base=transformers.T5ForConditionalGeneration(config))
    assert inputs.keys() == {"input_ids", "decoder_input_ids"}


def test_inputs_come_in_many_forms(load_base):
    """A tensor of ids, a mapping and what a tokenizer gives are all taken, as copies."""
    base = load_base()
    ids = IDS.clone()
    taken = probe_inputs(ids, base)["input_ids"]
    assert torch.equal(taken, IDS)
    ids.zero_()
    assert torch.equal(taken, IDS)
    encoded = make_tokenizer()(["a", "the tide"], padding=True, return_tensors="pt")
    assert probe_inputs(encoded, base).keys() == set(encoded.keys())
    mapping = {"input_ids": IDS[:, ::2], "attention_mask": torch.ones(2, 3)}
    assert all(tensor.is_contiguous() for tensor in probe_inputs(mapping, base).values())
    assert probe_inputs(None, base) is None
    assert probe_inputs(probe=False, base=base) is None


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        ("a text", "it is a str"),
        ([[1, 2]], "it is a list"),
        ({"input_ids": [[1, 2]]}, r"prediction_probe\['input_ids'\] is a list"),
    ],
)
def test_other_inputs_are_refused_before_anything_is_written(model, tmp_path, probe, text):
    """What is no tensor is a `TypeError` that says what to pass."""
    with pytest.raises(TypeError, match=text):
        model.save_pretrained(tmp_path / "adapter", prediction_probe=probe)
    assert not (tmp_path / "adapter").exists()


def test_no_inputs_are_made_up_for_pixels():
    """A vision model is given none; the error says what it takes."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
    )
    with pytest.raises(ValueError, match="ViTModel, which takes pixel_values"):
        probe_inputs(probe=True, base=transformers.ViTModel(config))


def test_inputs_that_the_model_does_not_take_cost_no_training(model, tmp_path):
    """The save fails, and says where the adapter is all the same."""
    with pytest.raises(SaveError, match="exactly one of input_ids or inputs_embeds") as error:
        model.save_pretrained(tmp_path / "adapter", prediction_probe={"colour": IDS})
    assert peft.PeftConfig.from_pretrained(error.value.rescued).peft_type == "LORA"


# Running


def test_the_model_runs_in_eval_mode_without_autocast(model, logits):
    """Dropout, autocast around it and the trainer's wrapper on `forward` make no difference."""
    expected = logits(model.eval())
    model.train()
    assert torch.equal(predict(model, {"input_ids": IDS}), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(predict(model, {"input_ids": IDS}), expected)
    model.forward = lambda **_: pytest.fail("the wrapper on the model ran")
    assert torch.equal(predict(model, {"input_ids": IDS}), expected)
    assert "forward" in vars(model)
    assert model.training


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_the_model_is_left_as_it_is(kind, load_base, with_lora):
    """Weights stay in their form, biases in their dtype, and modules hold what they held."""
    model = with_lora(load_base(kind))
    before = quantization.capture(ModelView.of(model))
    states = {
        name: {key: id(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }
    tensors = {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    codes = {
        name: vars(module.state).copy()
        for name, module in model.named_modules()
        if _is_8bit(module)
    }
    assert bool(codes) is (kind == "int8")
    predict(model, {"input_ids": IDS})
    assert quantization.capture(ModelView.of(model)) == before
    assert {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()} == tensors
    for name, module in model.named_modules():
        assert {key: id(value) for key, value in vars(module).items()} == states[name]
        if name in codes:
            assert vars(module.state) == codes[name]


def _is_8bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear8bitLt" and hasattr(module, "state")


def test_the_model_is_left_as_it_is_if_it_fails(model):
    """An exception in `forward` leaves flags and generators alone."""
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        predict(model, {"colour": IDS})
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)


class Noisy(nn.Module):
    """A model that draws in eval mode, from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
        """The output with noise."""
        noise = torch.rand(1) + random.random() + float(np.random.random())
        return None, self.linear(x) + noise


def test_a_model_that_draws_is_predictable_and_moves_no_generator():
    """The generators are seeded for the forward, and stand where they stood afterwards."""
    model, x = Noisy(), torch.ones(1, 4)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, second = (predict(model, {"x": x}) for _ in range(2))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert torch.equal(first, second)
    assert after == before


@pytest.mark.parametrize(
    "output",
    [
        types.SimpleNamespace(loss=torch.zeros(1), logits=torch.ones(2)),
        types.SimpleNamespace(pooled=torch.zeros(1), last_hidden_state=torch.ones(2)),
        (None, (torch.zeros(1, dtype=torch.int64), torch.ones(2)), torch.zeros(1)),
        {"mask": torch.zeros(1, dtype=torch.bool), "sample": torch.ones(2)},
        torch.ones(2),
    ],
    ids=["logits", "hidden states", "tuple", "mapping", "tensor"],
)
def test_what_is_stored_of_an_output(output):
    """The logits, or the hidden states, or the first tensor that there is."""

    class Model(nn.Module):
        def forward(self) -> Any:
            return output

    assert torch.equal(predict(Model(), {}), torch.ones(2))


def test_an_output_without_numbers_is_refused():
    """There is nothing to compare."""

    class Model(nn.Module):
        def forward(self) -> Any:
            return {"ids": torch.zeros(1, dtype=torch.int64)}

    with pytest.raises(ValueError, match="a dict holds no floating point tensor"):
        predict(Model(), {})


# Comparing


def test_the_same_model_predicts_the_same(model):
    """Nothing differs from a record of the model itself."""
    record = predictions.capture(view(model))
    assert mismatches(record, model) == {}
    assert (record.max_difference, record.kl_divergence, record.top1_agreement) == (0.0, 0.0, 1.0)


def test_a_difference_is_measured(model, logits):
    """Told are the largest difference, the divergence, and how often the first place holds."""
    record = predictions.capture(view(model))
    before = logits(model.eval())
    model.base_model.model.lm_head.weight.data[7:20] *= -1
    after = logits(model)
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    expected = {
        "max_difference": float((before - after).abs().max()),
        "kl_divergence": float((p * (p / q).log()).sum(-1).mean()),
        "top1_agreement": float((before.argmax(-1) == after.argmax(-1)).double().mean()),
    }
    assert mismatches(record, model) == pytest.approx(expected)
    assert expected["top1_agreement"] < 1


def test_in_the_same_environment_one_bit_counts(model):
    """The smallest change of a weight that changes a logit is a difference."""
    record = predictions.capture(view(model))
    model.base_model.model.lm_head.weight.data *= NEXT_UP
    found = mismatches(record, model)
    assert 0 < found["max_difference"] < 1e-4


def test_elsewhere_a_difference_of_rounding_is_none(model, elsewhere):
    """In another environment what other kernels may round is passed over, and no more."""
    record = predictions.capture(view(model))
    elsewhere()
    weight = model.base_model.model.lm_head.weight
    weight.data *= NEXT_UP
    assert mismatches(record, model) == {}
    weight.data *= 1.001
    assert mismatches(record, model)["max_difference"] > record.tolerance


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("nf4", torch.bfloat16)],
)
def test_the_tolerance_follows_from_the_dtype(kind, dtype, load_base, with_lora):
    """25 units of the coarsest dtype and a hundred of float32, of the largest logit."""
    record = predictions.capture(view(with_lora(load_base(kind))))
    largest = float(record.logits.load().abs().max())
    relative = 25 * torch.finfo(dtype).eps + 100 * torch.finfo(torch.float32).eps
    assert record.tolerance == pytest.approx(relative * largest)


def test_a_coarser_precision_of_products_widens_the_tolerance(model):
    """Where float32 is rounded to bfloat16 on the way, that is the dtype that counts."""
    exact = predictions.capture(view(model)).tolerance
    torch.set_float32_matmul_precision("medium")
    assert predictions.capture(view(model)).tolerance > 1000 * exact


@pytest.mark.parametrize(
    ("saved", "found", "difference"),
    [
        ([1.0, math.nan], [1.0, math.nan], 0.0),
        ([1.0, -math.inf], [1.0, -math.inf], 0.0),
        ([0.0, 1.0], [-0.0, 1.0], 0.0),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, math.inf], [1.0, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_what_is_no_number_counts_where_it_is_new(saved, found, difference):
    """Masked logits and those that are not a number agree with themselves only."""
    assert predictions.difference(torch.tensor(saved), torch.tensor(found)) == difference


def test_another_shape_or_dtype_is_told(model, load_base, with_lora):
    """Logits that cannot be subtracted differ by what keeps them from it."""
    record = predictions.capture(view(model))
    model.resize_token_embeddings(70)
    assert mismatches(record, model)["logits.shape"] == [2, 6, 70]
    assert mismatches(record, with_lora(load_base("bf16")))["logits.dtype"] == "bfloat16"


# Saves and loads


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("is_trainable", [None, False, True])
def test_a_reload_predicts_what_was_predicted(kind, is_trainable, load_base, with_lora, tmp_path):
    """With inputs in the folder each load runs the model on them, and agrees to the last bit."""
    model = with_lora(load_base(kind))
    model.save_pretrained(tmp_path, prediction_probe={"input_ids": IDS})
    record = peftstate.read_manifest(tmp_path).sections["predictions"]
    assert record.inputs["input_ids"].shape == (2, 6)
    generator = torch.get_rng_state()
    loaded = peftstate.PeftModel.from_pretrained(
        load_base(kind), tmp_path, is_trainable=is_trainable
    )
    assert torch.equal(torch.get_rng_state(), generator)
    report = peftstate.verify(loaded, tmp_path)
    assert "predictions" in report.sections
    assert report.of("predictions").ok
    inputs = {"input_ids": IDS}
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


def test_a_model_that_predicts_otherwise_is_refused(model, load_base, tmp_path):
    """What no other section is asked to look at shows in what the model says."""
    model.save_pretrained(tmp_path, prediction_probe=True)
    base = load_base()
    base.model.norm.weight.data[3] += 0.5
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(PredictionMismatchError) as error:
        peftstate.PeftModel.from_pretrained(base, tmp_path, on_mismatch={"base_model": "ignore"})
    assert {mismatch.section for mismatch in error.value.mismatches} == {"predictions"}
    assert "predictions.max_difference: saved 0.0, found" in str(error.value)
    assert [name for name, _ in base.named_modules()] == names


def test_a_change_of_the_live_model_is_verified(model, tmp_path):
    """`verify` runs the model, and leaves it as it is."""
    model.save_pretrained(tmp_path, prediction_probe=True)
    assert peftstate.verify(model, tmp_path).ok
    model.base_model.model.model.norm.weight.data[3] += 0.5
    assert not peftstate.verify(model, tmp_path).of("predictions").ok
    assert model.training


def test_without_inputs_nothing_is_stored(model, tmp_path):
    """The section is absent, and the sidecar holds no logits."""
    model.save_pretrained(tmp_path)
    assert "predictions" not in peftstate.read_manifest(tmp_path).sections


def test_a_model_of_no_library_predicts(tmp_path):
    """Any module whose `forward` takes the inputs will do."""

    def wrapped() -> Any:
        torch.manual_seed(3)
        base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        return base, LoraConfig(target_modules=["0"], init_lora_weights=False)

    model = peftstate.get_peft_model(*wrapped())
    model.save_pretrained(tmp_path, prediction_probe={"input": torch.rand(5, 4)})
    loaded = peftstate.PeftModel.from_pretrained(wrapped()[0], tmp_path)
    assert peftstate.verify(loaded, tmp_path).ok
    assert "predictions" in peftstate.verify(loaded, tmp_path).sections


def test_predictions_are_of_the_adapters_that_were_active(model, load_base, tmp_path):
    """A folder, or a load, without one of them does not compare what it took part in."""
    model.add_adapter("ref", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "ref"])
    model.save_pretrained(tmp_path, prediction_probe=True)
    root, extra = (peftstate.read_manifest(path) for path in (tmp_path, tmp_path / "ref"))
    assert root.sections["predictions"].adapters == ("default", "ref")
    assert "predictions" not in extra.sections
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert "predictions" in peftstate.verify(loaded, tmp_path).sections
    assert peftstate.verify(loaded, tmp_path).ok
    alone = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, adapters=())
    assert list(alone.peft_config) == ["default"]


def test_the_folder_of_the_only_active_adapter_has_its_predictions(model, load_base, tmp_path):
    """They hold for that folder alone, which others load under another name."""
    model.add_adapter("ref", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("ref")
    model.save_pretrained(tmp_path, prediction_probe=True)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / "ref", "mine")
    assert "predictions" in peftstate.verify(loaded, tmp_path / "ref").sections
    assert peftstate.verify(loaded, tmp_path / "ref").ok


def test_an_adapter_that_is_loaded_beside_others_predicts_nothing(
    model, load_base, with_lora, tmp_path
):
    """The model says what its active adapters say, so there is nothing to compare."""
    model.save_pretrained(tmp_path, prediction_probe=True)
    live = with_lora(load_base())
    live.load_adapter(tmp_path, "second")
    assert list(live.peft_config) == ["default", "second"]
