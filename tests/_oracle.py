"""What a model is, described without any of peftstate: the other side of the random lives."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tests.conftest import IDS

_CONTAINERS = ("BufferDict", "ModuleDict", "ModuleList", "ParameterDict")
"""Classes of modules whose train flag means nothing."""
_OF_LAYERS = ("_active_adapter", "_disable_adapters", "compute_dtype", "merged_adapters", "scaling")
"""Attributes of layers that decide what they compute."""
_OF_TRAINING = ("checkpoints ", "config ", "drops ", "requires grad ", "rng", "trains ")
"""How the names begin of what a load for inference leaves alone, or has its own word on."""


def describe(model: Any) -> dict[str, Any]:
    """All that is known of a model and of the random generators, by names that say what it is."""
    found: dict[str, Any] = {"rng": _rng()}
    for name, module in model.named_modules():
        found |= _of_module(name, module)
    found |= _of_tensors(model)
    base = model
    if hasattr(model, "peft_config"):
        found["active"] = tuple(model.active_adapters)
        for name, config in model.peft_config.items():
            fields = config.to_dict()
            del fields["base_model_name_or_path"]  # which a save of PEFT's fills in
            found[f"config {name}"] = {
                key: sorted(value) if isinstance(value, set) else value
                for key, value in fields.items()
            }
        base = model.get_base_model()
    found["generation"] = base.generation_config.to_dict()
    found["cache"] = base.config.use_cache
    found["attention"] = base.config._attn_implementation
    return found


def _rng() -> tuple[Any, ...]:
    """The states of the random generators."""
    _, keys, position, *_ = np.random.get_state()
    torch_state = torch.get_rng_state().numpy().tobytes()
    return torch_state, random.getstate(), np.asarray(keys).tobytes(), position


def _of_module(name: str, module: nn.Module) -> dict[str, Any]:
    """What a module is itself."""
    found: dict[str, Any] = {f"class {name}": type(module).__name__}
    if type(module).__name__ not in _CONTAINERS:
        found[f"trains {name}"] = module.training
    found[f"checkpoints {name}"] = getattr(module, "gradient_checkpointing", False)
    if isinstance(module, nn.Dropout):
        found[f"drops {name}"] = module.p
    if isinstance(module, BaseTunerLayer):
        found |= {
            f"{key} {name}": value
            for key, value in vars(module).items()
            if key in _OF_LAYERS and not callable(value)
        }
    return found


def _of_tensors(model: nn.Module) -> dict[str, Any]:
    """The bytes of all tensors, which require gradients, and which are one."""
    found: dict[str, Any] = {}
    names: defaultdict[int, list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in {**parameters, **dict(model.named_buffers())}.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[f"tensor {name}"] = (str(tensor.dtype), tuple(tensor.shape), raw)
        found[f"requires grad {name}"] = tensor.requires_grad
        names[id(tensor)].append(name)
    found["tied"] = sorted(each for each in names.values() if len(each) > 1)
    return found


def differences(one: dict[str, Any], other: dict[str, Any], *, for_inference: bool) -> list[str]:
    """The names of what is not the same in two descriptions.

    Args:
        one: A description.
        other: Another one.
        for_inference: Whether the other model was loaded for inference.
    """
    return sorted(
        name
        for name in one.keys() | other.keys()
        if one.get(name) != other.get(name)
        and not (for_inference and name.startswith(_OF_TRAINING))
    )


def outputs(model: Any) -> torch.Tensor | str:
    """What a model predicts, or the name of the error that it raises instead."""
    try:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=IDS).logits
    except (RuntimeError, ValueError) as error:  # of dtypes that do not go together
        return type(error).__name__
    return found
