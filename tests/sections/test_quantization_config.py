"""Tests of how quantization configs are written to manifests, and made from them."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from peftstate.sections._quantization_config import (
    BITSANDBYTES_FIELDS,
    bitsandbytes_config,
    of_model,
    to_json,
)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "bitsandbytes_4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "bitsandbytes_8bit": {"load_in_8bit": True},
    "gptq": {"bits": 4, "dataset": ["a text"], "tokenizer": object()},
    "torchao": {"quant_type": "int8_weight_only"},
}
NEED_A_BACKEND = {"compressed-tensors", "hqq", "quark", "torchao"}
"""Methods whose config cannot be made without another package."""

CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


def configs() -> dict[str, Any]:
    """A config of each method that transformers knows and that can be made here."""
    made = {}
    for method, cls in AUTO_QUANTIZATION_CONFIG_MAPPING.items():
        try:
            made[method] = cls(**ARGUMENTS.get(method, {}))
        except (ImportError, ValueError):
            assert method in NEED_A_BACKEND
    return made


CONFIGS = configs()


def model_with(config: Any) -> Any:
    """What is looked at of a model that was loaded with a quantization config."""
    return SimpleNamespace(config=SimpleNamespace(quantization_config=config))


@pytest.mark.parametrize("method", CONFIGS)
def test_the_config_of_every_method_is_recorded(method):
    """As JSON that comes back as it was, the same each time, with the method's name in it."""
    fields = of_model(model_with(CONFIGS[method]))
    assert fields is not None
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields == of_model(model_with(type(CONFIGS[method])(**ARGUMENTS.get(method, {}))))
    assert fields["quant_method"] == CONFIGS[method].quant_method.value
    assert not [key for key in fields if key.startswith("_")]


@pytest.mark.parametrize("method", AUTO_QUANTIZATION_CONFIG_MAPPING)
def test_the_config_of_a_checkpoint_is_recorded(method):
    """A model that transformers has not quantized itself carries the config as a mapping."""
    fields = {"quant_method": method, "bits": 4, "modules_to_not_convert": ["lm_head"]}
    assert of_model(model_with(fields)) == fields


def test_a_model_without_a_config_has_none():
    """Neither a model of transformers nor any other module."""
    assert of_model(model_with(None)) is None
    assert of_model(torch.nn.Linear(2, 2)) is None


def test_the_config_of_the_quantizer_is_taken_if_the_model_has_none():
    """It is in both places while transformers holds the model."""
    model = SimpleNamespace(hf_quantizer=SimpleNamespace(quantization_config=CONFIG))
    assert of_model(model) == to_json(CONFIG)


class _Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class _Inner:
    dtype: torch.dtype


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.device("cpu"), "cpu"),
        (_Colour.RED, "red"),
        ({_Colour.RED: (1, 2.5, None, True)}, {"red": [1, 2.5, None, True]}),
        ({"b": 1, "a": 2, "_private": 3}, {"a": 2, "b": 1}),
        ({"c", "a", "b"}, ["a", "b", "c"]),
        (float("inf"), "inf"),
        (_Inner(torch.float16), {"class": "_Inner", "dtype": "float16"}),
        (object(), "object"),
        (torch.nn.Linear, "Linear"),
        (json.dumps, "dumps"),
    ],
)
def test_values_become_json(value, expected):
    """Names stand for dtypes, enums and classes; no address of an object gets into a manifest."""
    assert to_json(value) == expected
    assert json.dumps(to_json(value)) == json.dumps(expected)


def test_every_argument_of_bitsandbytes_config_is_handled():
    """An argument that transformers adds must be handled, or left out for a reason."""
    parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters
    assert parameters.keys() - {"self", "kwargs"} == BITSANDBYTES_FIELDS.keys()


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_in_8bit": True, "llm_int8_threshold": 3.0},
        {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
        {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True},
        {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.float32},
    ],
)
def test_the_config_of_bitsandbytes_comes_back(arguments):
    """What was recorded makes the config that it was recorded of."""
    config = BitsAndBytesConfig(**arguments)
    fields = json.loads(json.dumps(to_json(config)))
    assert bitsandbytes_config(fields).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bnb_4bit_compute_dtype", "load"),
        ("bnb_4bit_compute_dtype", "int8"),
        ("bnb_4bit_compute_dtype", None),
        ("bnb_4bit_compute_dtype", ["float16"]),
        ("bnb_4bit_quant_storage", "hub"),
        ("bnb_4bit_quant_type", "fp8"),
        ("bnb_4bit_use_double_quant", 1),
        ("llm_int8_threshold", True),
        ("llm_int8_threshold", "6.0"),
        ("llm_int8_skip_modules", "lm_head"),
        ("llm_int8_skip_modules", [1]),
        ("trust_remote_code", True),
        ("quant_method", "gptq"),
    ],
)
def test_what_a_manifest_may_not_set_is_refused(name, value):
    """Neither other names nor other values reach transformers, which looks some up in torch."""
    fields = to_json(CONFIG) | {name: value}
    with pytest.raises(ValueError, match=f"has {name}=.*pass quantization_config="):
        bitsandbytes_config(fields)
