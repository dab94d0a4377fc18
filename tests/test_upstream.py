"""Tests that fail when PEFT or transformers grow what we neither handle nor list with a reason.

Further tables of this kind are kept where they are used: the fields of `GenerationConfig` in
`sections/test_generation.py`, the arguments of `BitsAndBytesConfig` in
`sections/test_quantization_config.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import peft
import pytest
import torch
import transformers
from huggingface_hub import hf_hub_download
from peft.mapping_func import (  # type: ignore[attr-defined]
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
)
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from transformers import tokenization_utils_base
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peftstate
from peftstate import _tokenizer_files
from peftstate._arguments import HUB_ARGUMENTS
from peftstate.sections import (
    _adapter_config,
    _bit_generators,
    _model_config,
    _origin,
    _remote_code,
)
from peftstate.sections._generators import ACCELERATORS
from peftstate.sections.implementation import ATTENTION, EXPERTS

# Parameters

METHODS = [
    (peft.PeftModel, peftstate.PeftModel, "from_pretrained"),
    (peft.PeftModel, peftstate.PeftModel, "load_adapter"),
    (peft.PeftModel, peftstate.PeftModel, "save_pretrained"),
    (peft.AutoPeftModel, peftstate.AutoPeftModel, "from_pretrained"),
]
OTHER_DEFAULTS = {("from_pretrained", "is_trainable"): None}
"""Where we differ from PEFT, on purpose: a model comes back as it was saved."""
COLLISIONS = {"XLoraConfig": {"adapters"}}
"""Fields of configs: what a load is given for them is overruled by the config's file, in which they
always are (`peft/config.py::PeftConfigMixin.from_pretrained`)."""


@pytest.mark.parametrize(
    ("theirs", "ours", "method"),
    METHODS,
    ids=[f"{cls.__name__}.{name}" for cls, _, name in METHODS],
)
def test_parameters_are_those_of_peft(theirs, ours, method):
    """Every call of PEFT's method is a call of ours: same names, same order, same defaults."""
    expected = parameters(getattr(theirs, method))
    found = parameters(getattr(ours, method))
    positional = [name for name, it in found.items() if it.kind is it.POSITIONAL_OR_KEYWORD]
    assert [name for name in positional if name in expected] == [
        name for name, it in expected.items() if it.kind is it.POSITIONAL_OR_KEYWORD
    ]
    for name, parameter in expected.items():
        default = OTHER_DEFAULTS.get((method, name), parameter.default)
        assert found[name].default == default, name
        assert found[name].kind is parameter.kind, name


@pytest.mark.parametrize(
    ("theirs", "ours", "method"),
    METHODS,
    ids=[f"{cls.__name__}.{name}" for cls, _, name in METHODS],
)
def test_additional_parameters_are_keywords_and_collide_with_none(theirs, ours, method):
    """What we add is given by name, and means nothing to whatever PEFT passes it on to."""
    found = parameters(getattr(ours, method))
    added = {name for name, it in found.items() if it.kind is it.KEYWORD_ONLY}
    assert added
    passed_on: list[Any] = [
        getattr(theirs, method),
        peft.PeftConfig.from_pretrained,
        peft.PeftModel.from_pretrained,
        peft.PeftModel.load_adapter,
        peft.PeftModel.push_to_hub,
        hf_hub_download,
        *peft.PEFT_TYPE_TO_CONFIG_MAPPING.values(),
    ]
    for function in passed_on:
        known = COLLISIONS.get(function.__name__, set())
        assert added & parameters(function).keys() <= known, function


def test_wrapping_takes_what_peft_takes():
    """Whatever `peft.get_peft_model` takes is handed on to it."""
    kinds = [it.kind for it in parameters(peftstate.get_peft_model).values()]
    assert inspect.Parameter.VAR_POSITIONAL in kinds
    assert inspect.Parameter.VAR_KEYWORD in kinds


def test_arguments_of_the_hub_are_those_of_the_hub():
    """What is handed to the download is known there."""
    assert set(HUB_ARGUMENTS) <= parameters(hf_hub_download).keys()


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a function by name."""
    return dict(inspect.signature(function).parameters)


# Classes


@pytest.mark.parametrize(
    "name",
    sorted(
        name for name in vars(peft) if name.startswith(("PeftModel", "AutoPeftModel", "PeftMixed"))
    ),
)
def test_class_of_peft_is_one_of_ours(name):
    """Every model class and auto class can be imported from here instead, and is PEFT's."""
    theirs, ours = getattr(peft, name), getattr(peftstate, name)
    assert ours.__name__ == name
    assert issubclass(ours, theirs)


@pytest.mark.parametrize("cls", MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())
def test_model_of_every_task_can_be_attached_to(cls):
    """Whatever PEFT wraps a model in for a task, we have a class for."""
    ours = getattr(peftstate, cls.__name__)
    assert issubclass(ours, (cls, peftstate.PeftModel))


KNOWN_METHODS = {
    "from_pretrained": "ours",
    "get_prompt_embedding_to_save": "computes what save_pretrained writes",
    "load_adapter": "ours",
    "push_to_hub": "ours",
    "save_pretrained": "ours",
}


def test_every_way_to_save_and_load_is_known():
    """A new method of PEFT's that saves or loads would go past the manifest."""
    homes = {cls for cls in peft.PeftModel.__mro__ if cls is not torch.nn.Module}
    found = {
        name
        for home in homes
        for name in vars(home)
        if callable(getattr(home, name)) and not name.startswith("_")
        if any(word in name for word in ("save", "load", "push", "pretrained"))
    }
    assert found == KNOWN_METHODS.keys()


def test_layers_that_hold_a_module_of_the_base_are_known():
    """The walk over a model looks through each kind of wrapper in its own way."""
    found = {
        cls
        for cls in AuxiliaryTrainingWrapper.__subclasses__()
        if cls.__module__.startswith("peft.")
    }
    assert found == {ModulesToSaveWrapper, TrainableTokensWrapper}


# Values

HARMLESS_INITS = {
    "eva": "sets the adapter's own weights",
    "gaussian": "sets the adapter's own weights",
    "mica": "sets the adapter's own weights",
    "orthogonal": "sets the adapter's own weights",
}


def test_initialisations_that_rewrite_the_base_are_known():
    """An adapter that is attached to only afterwards has changed the base model already."""
    hint = get_type_hints(peft.LoraConfig)["init_lora_weights"]
    values = [
        value for part in get_args(hint) if get_origin(part) is Literal for value in get_args(part)
    ]
    assert "pissa" in values
    unknown = [
        value
        for value in values
        if value not in HARMLESS_INITS and not value.startswith(_origin._REWRITING)
    ]
    assert unknown == []


UNSET_ATTENTION = {
    "eager_paged": "of continuous batching, set while a server runs",
    "paged|eager": "of continuous batching, set while a server runs",
    "paged|flash_attention_2": "of continuous batching, set while a server runs",
    "paged|sdpa": "of continuous batching, set while a server runs",
    "paged_attention": "of continuous batching, set while a server runs",
    "sdpa_paged": "of continuous batching, set while a server runs",
}


def test_implementations_of_attention_are_known():
    """What transformers has of its own is restored, or there is a reason why not."""
    found = set(type(ALL_ATTENTION_FUNCTIONS)._global_mapping)
    assert found - ATTENTION - UNSET_ATTENTION.keys() == set()


UNSET_EXPERTS = {
    "deepgemm": "a kernel from the Hub",
    "sonicmoe": "a kernel from the Hub",
}


def test_implementations_of_experts_are_known():
    """The same for mixtures of experts, which older versions of transformers only have eager."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        found = set()
    else:
        found = set(type(ALL_EXPERTS_FUNCTIONS)._global_mapping)
    assert found - EXPERTS - UNSET_EXPERTS.keys() == set()


# Names of fields

OF_OTHER_VERSIONS = {
    "_attn_implementation_autoset": "transformers 4",
    "attn_implementation": "transformers 4, in files",
    "lora_B_layout": "Unsloth, in files",
    "decoder_start_token_id": "a field of models with a decoder only",
    "rope_local_base_freq": "transformers 4",
    "rope_parameters": "transformers 5",
    "rope_scaling": "transformers 4",
    "rope_theta": "transformers 4",
    "experts_implementation": "transformers 5, in files",
    "partial_rotary_factor": "transformers 4",
    "peft_version": "PEFT 0.18",
    "sep_token_id": "a field of all configs in transformers 4",
    "torch_dtype": "transformers 4",
    "unsloth_fused_expert_lora": "Unsloth, in files",
}
"""Names that not all versions, or not all models, have."""


CONFIGS = (
    "Bert Cohere GPT2 GPTNeoX Gemma2 Gemma3Text Granite Llama OPT Phi Qwen2 Qwen2Moe Starcoder2 T5"
)
"""Kinds of models that have, together, all fields of configs that are known to us."""


@pytest.mark.parametrize("name", sorted(_model_config.NOT_IN_CONFIG | _model_config.BUILT_CONFIG))
def test_field_of_a_model_config_exists(name):
    """No list holds a name that is misspelt."""
    configs = [getattr(transformers, f"{kind}Config")() for kind in CONFIGS.split()]
    known = any(hasattr(config, name) for config in configs)
    assert known or name in OF_OTHER_VERSIONS or name == "quantization_config"


def test_package_of_remote_code_is_that_of_transformers():
    """Where classes that a checkpoint brought with it are."""
    assert transformers.utils.TRANSFORMERS_DYNAMIC_MODULE_NAME == _remote_code.PACKAGE


def test_kinds_of_generators_of_numpy_are_known():
    """A kind that numpy gets anew could not be saved."""
    kinds = {
        name
        for name, item in vars(np.random).items()
        if inspect.isclass(item) and issubclass(item, np.random.BitGenerator)
    }
    assert kinds - {"BitGenerator"} == _bit_generators._PARTS.keys()


def test_files_of_tokenizers_are_known():
    """Those that every tokenizer may have, and those of each kind."""
    names = {
        value
        for name, value in vars(tokenization_utils_base).items()
        if name.endswith("_FILE") and isinstance(value, str)
    }
    assert "tokenizer_config.json" in names
    for kind in ("Bert", "GPT2", "Llama", "T5", "XLMRoberta", "Gemma", "Qwen2"):
        names |= set(getattr(transformers, f"{kind}TokenizerFast").vocab_files_names.values())
    unknown = [name for name in names if not _tokenizer_files._FILES.fullmatch(name)]
    assert set(unknown) <= UNKNOWN_FILES.keys()


UNKNOWN_FILES: dict[str, str] = {}
"""Files of tokenizers that are not looked at, and why."""


@pytest.mark.parametrize("name", sorted(_adapter_config.NOT_IN_CONFIG))
def test_field_of_an_adapter_config_exists(name):
    """No list holds a name that is misspelt."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert name in fields or name in OF_OTHER_VERSIONS


def test_sets_of_an_adapter_config_are_known():
    """A field that PEFT makes a set of is written in random order, and must be sorted.

    It makes one of what it is given as a list, in `__post_init__`.
    """
    found = set()
    for config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.values():
        names, source = (
            {field.name for field in dataclasses.fields(config)},
            inspect.getsource(config),
        )
        found |= {name for name in names if f"set(self.{name})" in source}
    assert {"target_modules", "feedforward_modules"} <= found <= _adapter_config._SETS


OTHER_GENERATORS = {"mtia": "an accelerator that is nowhere to be had"}


def test_kinds_of_devices_with_generators_are_known():
    """The generators of each kind of accelerator that torch has are recorded."""
    kinds = {
        name
        for name, module in vars(torch).items()
        if inspect.ismodule(module) and "get_rng_state" in vars(module) and name != "random"
    }
    assert kinds - {"torch"} - OTHER_GENERATORS.keys() <= set(ACCELERATORS)
