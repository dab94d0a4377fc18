"""The layers that PEFT puts into a base model, and the tuners that do it in a way of their own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from peftstate._modules import is_layer_of_peft

if TYPE_CHECKING:
    import torch
    from torch import nn


def original_key(module: nn.Module) -> str | None:
    """The attribute under which a layer of PEFT holds the base model's module that it replaces."""
    cls: type = type(module)
    key = _original_key(cls)
    return None if key == "base_layer" and key not in module._modules else key


@cache
def _original_key(cls: type) -> str | None:
    """`original_key` of the modules of a class."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    if issubclass(cls, TrainableTokensWrapper):
        return "token_adapter"  # in which, as in any layer, there is a `base_layer`
    if issubclass(cls, AuxiliaryTrainingWrapper):
        return "original_module"
    if issubclass(cls, BaseTunerLayer):
        return "base_layer"
    if issubclass(cls, _adapted_attentions()):
        return "model"
    return None


def original(module: nn.Module) -> nn.Module:
    """The base model's module that layers of PEFT are around; or the module itself."""
    while (name := original_key(module)) is not None:
        inner = module._modules[name]
        if inner is None:
            break
        module = inner
    return module


def is_adapted_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer with PEFT's adaption prompt around it."""
    return isinstance(module, _adapted_attentions())


def _adapted_attentions() -> tuple[type[nn.Module], ...]:
    """The classes of PEFT's layers around an attention layer."""
    from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT

    return (AdaptedAttention, AdaptedAttentionGPT)


def replicated_layers(model: Any) -> list[int] | None:
    """The layers that LoRA's `layer_replication` made the model's layers of, by their old numbers.

    The new layers share the parameters of the old ones
    (`peft/tuners/tuners_utils.py::replicate_layers`).
    """
    for config in getattr(model, "peft_config", {}).values():
        if ranges := getattr(config, "layer_replication", None):
            return [number for start, end in ranges for number in range(start, end)]
    return None


def cached_layers(model: nn.Module) -> dict[int, list[tuple[str, str, nn.Module]]]:
    """The layers of adaption prompts that are not in the model now.

    Only those of one adapter are; the tuner keeps the others in a cache
    (`peft/tuners/adaption_prompt/model.py::AdaptionPromptModel._cached_adapters`).

    Returns:
        For the module that such a layer goes to, by its identity: the adapter, the name of the
        layer in that module, the layer.
    """
    from peft.tuners.adaption_prompt import AdaptionPromptModel

    found: dict[int, list[tuple[str, str, nn.Module]]] = {}
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, AdaptionPromptModel):
        for adapter, layers in tuner._cached_adapters.items():
            key = tuner.peft_config[adapter].target_modules
            for parent, layer in zip(tuner._parents[adapter], layers, strict=True):
                found.setdefault(id(parent), []).append((adapter, key, layer))
    return found


def plain_tensors(module: nn.Module, adapter: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a layer keeps in plain dictionaries, by the adapter's name.

    So do the tuners that train a few entries of a matrix, with the indices of these, drawn from a
    seed (`peft/tuners/fourierft/layer.py::FourierFTLayer.indices`).
    """
    cls: type = type(module)
    if not is_layer_of_peft(cls):
        return
    from torch import Tensor

    for leaf, value in vars(module).items():
        if type(value) is not dict or leaf in ("_parameters", "_buffers"):
            continue
        if isinstance(tensor := value.get(adapter), Tensor):
            yield leaf, tensor
