"""Tests of the section `generation`."""

from __future__ import annotations

import copy
import json
from typing import Any

import attrs
import pytest
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    SynthIDTextWatermarkingConfig,
    ViTConfig,
    ViTModel,
    WatermarkingConfig,
)

from peftstate.sections import generation
from peftstate.sections._view import ModelView
from peftstate.sections.generation import NOT_SAVED, SECTION, GenerationRecord

EXAMPLES: dict[str, Any] = {
    "_from_model_config": True,
    "assistant_confidence_threshold": 0.3,
    "assistant_early_exit": 2,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 7,
    "bad_words_ids": [[3, 4], [5]],
    "begin_suppress_tokens": [1, 2],
    "bos_token_id": 9,
    "cache_config": {"nbits": 4},
    "cache_implementation": "static",
    "constraints": [[1, 2]],
    "decoder_start_token_id": 4,
    "disable_compile": True,
    "diversity_penalty": 0.5,
    "do_sample": True,
    "dola_layers": "high",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "eos_token_id": [7, 9],
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
    "exponential_decay_length_penalty": [5, 1.5],
    "force_words_ids": [[4]],
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 3,
    "generation_kwargs": {"key": 1},
    "guidance_scale": 1.5,
    "is_assistant": True,
    "length_penalty": 0.5,
    "low_memory": True,
    "max_cache_len": 32,
    "max_length": 30,
    "max_matching_ngram_size": 3,
    "max_new_tokens": 12,
    "max_time": 1.5,
    "min_length": 2,
    "min_new_tokens": 2,
    "min_p": 0.05,
    "no_repeat_ngram_size": 2,
    "num_assistant_tokens": 9,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 5,
    "penalty_alpha": 0.5,
    "prefill_chunk_size": 16,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 1.25,
    "return_dict_in_generate": True,
    "return_legacy_cache": True,
    "sequence_bias": [[[1, 2], -10.0]],
    "speculation_type": "dflash",
    "stop_strings": ["\n\n"],
    "suppress_tokens": [3],
    "target_lookbehind": 7,
    "temperature": 0.3,
    "token_healing": True,
    "top_h": 0.4,
    "top_k": 11,
    "top_p": 0.9,
    "typical_p": 0.8,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="selfhash"),
}
"""A value for each field that is restored, of all versions of transformers that are supported."""


@pytest.fixture(scope="module")
def _models(load_base):
    """Two models, loaded once."""
    return load_base("bf16"), load_base("bf16")


@pytest.fixture
def models(_models):
    """Two equal models, of which tests edit the configs alone."""
    configs = [(model.generation_config, model.config.use_cache) for model in _models]
    for model in _models:
        model.generation_config = copy.deepcopy(model.generation_config)
    yield _models
    for model, (config, use_cache) in zip(_models, configs, strict=True):
        model.generation_config, model.config.use_cache = config, use_cache


def capture(model: nn.Module) -> GenerationRecord:
    """The record of a model, through JSON and back."""
    record = generation.capture(ModelView(model=model))
    return SECTION.decode(json.loads(json.dumps(SECTION.encode(record))))


def restore(record: GenerationRecord, model: nn.Module) -> list[str]:
    """Restore a record, and report what still differs."""
    generation.restore(record, ModelView(model=model))
    return [str(mismatch) for mismatch in SECTION.compare(record, capture(model))]


@pytest.mark.parametrize("name", sorted(GenerationConfig().to_dict().keys() - NOT_SAVED))
def test_field_is_restored(name, models):
    """A field of the generation config, set on the live model, is there again after a load.

    A field without an example is new in transformers: it needs one here, or a reason in
    `NOT_SAVED`.
    """
    model, base = models
    setattr(model.generation_config, name, EXAMPLES[name])
    record = capture(model)
    assert restore(record, base) == []
    found = getattr(base.generation_config, name)
    assert type(found) is type(EXAMPLES[name])
    assert found == EXAMPLES[name] or vars(found) == vars(EXAMPLES[name])


def test_watermarks_are_told_apart(models):
    """`generate` gets an object of the class that was set, with its fields."""
    model, base = models
    mark = SynthIDTextWatermarkingConfig(ngram_len=5, keys=[3, 4])
    model.generation_config.watermarking_config = mark
    assert restore(capture(model), base) == []
    found = base.generation_config.watermarking_config
    assert type(found) is SynthIDTextWatermarkingConfig
    assert vars(found) == vars(mark)


def test_fields_that_are_unset_are_not_recorded(load_base):
    """The record holds what the model says, not the defaults of a transformers version."""
    record = capture(load_base("bf16"))
    assert record.config is not None
    assert record.config["eos_token_id"] == 2
    assert "max_new_tokens" not in record.config
    assert "transformers_version" not in record.config


def test_field_that_was_set_to_nothing_is_restored(models):
    """`None` may be a choice: no end of sequence, where the fresh model has one."""
    model, base = models
    model.generation_config.eos_token_id = None
    assert base.generation_config.eos_token_id == 2
    assert restore(capture(model), base) == []
    assert base.generation_config.eos_token_id is None


def test_values_that_contradict_each_other_are_restored(models):
    """Whatever a session left on the live model is put back, whatever transformers thinks of it."""
    model, base = models
    model.generation_config.temperature = 0.5  # without sampling
    model.generation_config.num_return_sequences = 4  # of one beam
    assert restore(capture(model), base) == []


def test_generation_goes_on_as_saved(models):
    """The restored model stops at the same token and takes the same choices."""
    model, other = models
    ids = torch.arange(4, 10).reshape(1, 6)
    model.generation_config.max_new_tokens = 5
    model.generation_config.repetition_penalty = 3.0
    expected = model.generate(input_ids=ids)
    model.generation_config.eos_token_id = [2, int(expected[0, 7])]
    stopped = model.generate(input_ids=ids)
    assert stopped.shape[1] == 8
    assert restore(capture(model), other) == []
    assert torch.equal(other.generate(input_ids=ids), stopped)


def test_use_cache_is_restored(models):
    """`prepare_model_for_kbit_training` and trainers switch the cache off on the config."""
    model, base = models
    model.config.use_cache = False
    assert restore(capture(model), base) == []
    assert base.config.use_cache is False


def test_use_cache_is_restored_where_the_config_has_no_such_field():
    """`Trainer` sets it on the config of every model; that of a vision model has no cache."""
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, base = (ViTModel(copy.deepcopy(config)) for _ in range(2))
    assert not hasattr(base.config, "use_cache")
    model.config.use_cache = False
    assert restore(capture(model), base) == []
    assert base.config.use_cache is False


def test_fields_that_nobody_knows_are_a_difference(load_base):
    """A manifest sets no attribute that neither transformers nor the model has."""
    base = load_base("bf16")
    record = capture(base)
    assert record.config is not None
    record = attrs.evolve(record, config={**record.config, "validate": 1, "unheard_of": 2})
    differences = restore(record, base)
    assert differences == [
        "generation.config.unheard_of: saved 2, found absent",
        "generation.config.validate: saved 1, found absent",
    ]
    assert callable(base.generation_config.validate)


def test_fields_of_a_model_of_its_own_are_restored(models):
    """Some models (Whisper) have more fields, which the fresh one has, too."""
    model, base = models
    model.generation_config.no_timestamps_token_id = 3
    base.generation_config.no_timestamps_token_id = 4
    assert restore(capture(model), base) == []
    assert base.generation_config.no_timestamps_token_id == 3


def test_model_without_a_generation_config(load_base, classifier):
    """A model that does not generate has a record that says so, and restoring it does nothing."""
    model = load_base("bf16", classifier, "AutoModelForSequenceClassification")
    record = capture(model)
    assert restore(record, model) == []
    linear = nn.Linear(1, 1)
    assert capture(linear) == GenerationRecord(config=None, use_cache=None)
    assert restore(capture(linear), linear) == []
