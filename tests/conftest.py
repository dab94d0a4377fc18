"""What the tests share: tiny models made from configs, and a process that no test changes."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on what is on the Hub

import hypothesis
import numpy as np
import torch

# How fast examples are made says something of the machine alone.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")

IDS = torch.arange(4, 16).reshape(2, 6)
"""Inputs of a model, no padding among them."""

KINDS = ("fp32", "bf16", "nf4", "int8")
"""How the base models of `load_base` come: in a dtype, or quantized, with all else in bf16."""


@pytest.fixture(autouse=True)
def _isolated_rng():
    """Start each test from the same random numbers, and leave the process those it had."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(autouse=True)
def _isolated_settings():
    """Leave the settings that torch holds for the whole process as they were."""
    setters = {
        torch.set_default_dtype: torch.get_default_dtype,
        torch.set_grad_enabled: torch.is_grad_enabled,
        torch.set_float32_matmul_precision: torch.get_float32_matmul_precision,
        torch.use_deterministic_algorithms: torch.are_deterministic_algorithms_enabled,
    }
    flags = [
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
    ]
    before = [(setter, getter()) for setter, getter in setters.items()]
    before_flags = [(backend, name, getattr(backend, name)) for backend, name in flags]
    yield
    for setter, value in before:
        setter(value)
    for flag in before_flags:
        setattr(*flag)


def _save_llama(folder: Path, model_class: str, **fields: Any) -> Path:
    """A Llama with random weights, of dimensions that bitsandbytes quantizes and repacks.

    The checkpoint is in bf16, so that it holds the same values in whatever dtype it is loaded.
    """
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,  # bitsandbytes casts biases while a model runs
        initializer_range=0.2,  # logits as large as those of a trained model
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    getattr(transformers, model_class)(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def causal_lm(tmp_path_factory):
    """The folder of a tiny causal language model."""
    return _save_llama(tmp_path_factory.mktemp("causal-lm"), "LlamaForCausalLM")


@pytest.fixture(scope="session")
def tied_lm(tmp_path_factory):
    """The folder of a tiny causal language model whose embeddings are tied."""
    folder = tmp_path_factory.mktemp("tied-lm")
    return _save_llama(folder, "LlamaForCausalLM", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The folder of a tiny sequence classifier with three labels, its head saved."""
    folder = tmp_path_factory.mktemp("classifier")
    return _save_llama(folder, "LlamaForSequenceClassification", num_labels=3)


@pytest.fixture(scope="session")
def load_base(causal_lm):
    """Loads a fresh base model: `load_base(kind, path, auto_class, **from_pretrained)`.

    `kind` is one of `KINDS`; the path is by default that of `causal_lm`. It comes in eval mode,
    as `from_pretrained` gives it.
    """
    import transformers

    options = {
        "fp32": {"dtype": torch.float32},
        "bf16": {"dtype": torch.bfloat16},
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "int8": {"load_in_8bit": True},
    }

    def load(
        kind: str = "fp32",
        path: Path = causal_lm,
        auto_class: str = "AutoModelForCausalLM",
        **keywords: Any,
    ) -> Any:
        if kind in ("fp32", "bf16"):
            keywords = {**options[kind], **keywords}
        else:
            config = transformers.BitsAndBytesConfig(**options[kind])
            keywords = {"dtype": torch.bfloat16, "quantization_config": config, **keywords}
        return getattr(transformers, auto_class).from_pretrained(path, **keywords)

    return load


@pytest.fixture(scope="session")
def with_lora():
    """Wraps a base model: `with_lora(base, **lora_config)`; the adapter changes the logits."""
    import peft

    import peftstate

    def wrap(base: Any, **fields: Any) -> Any:
        fields = {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "down_proj"],
            "init_lora_weights": False,  # random B, or the adapter does nothing
            "task_type": "CAUSAL_LM",
            **fields,
        }
        return peftstate.get_peft_model(base, peft.LoraConfig(**fields))

    return wrap


@pytest.fixture(scope="session")
def logits():
    """Runs a model in its mode, without gradients: `logits(model, ids)`."""

    def run(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = model(input_ids=ids).logits
        return output

    return run
