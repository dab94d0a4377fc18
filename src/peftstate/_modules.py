"""The modules of a model."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn


def modules_of(model: nn.Module, *, beside: Collection[str] = ()) -> list[nn.Module]:
    """Every module of a model, in the order of ``model.modules()``.

    That one hands each module up through all that it is in, which takes several times as long.

    Args:
        model: The model.
        beside: Names of adapters whose own modules are left out: what the layers of PEFT hold by
            these names. On a server there are hundreds for each module of the base model.
    """
    found: dict[int, nn.Module] = {}
    todo: list[tuple[nn.Module, bool]] = [(model, False)]
    while todo:
        module, in_layer = todo.pop()
        if id(module) in found:
            continue
        found[id(module)] = module
        inner = module._modules
        if in_layer and beside and is_container(module):
            inner = {key: child for key, child in inner.items() if key not in beside}
        is_layer = bool(beside) and is_layer_of_peft(_class(module))
        todo.extend((child, is_layer) for child in reversed(inner.values()) if child is not None)
    return list(found.values())


def shared_modules_of(model: Any) -> list[nn.Module]:
    """Every module of a model but those that belong to one of its adapters."""
    return modules_of(model, beside=getattr(model, "peft_config", ()))


def layers_of_peft(model: Any) -> list[nn.Module]:
    """The layers that PEFT put into a model."""
    return [module for module in shared_modules_of(model) if is_layer_of_peft(_class(module))]


def _class(module: nn.Module) -> type:
    """The class of a module, which mypy does not take for hashable."""
    return type(module)


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others, or tensors, by key."""
    return isinstance(module, _containers())


@cache
def _containers() -> tuple[type[nn.Module], ...]:
    """The classes of modules that only hold others."""
    from peft.tuners._buffer_dict import BufferDict
    from torch import nn

    return (nn.ModuleDict, nn.ParameterDict, BufferDict)


@cache
def is_layer_of_peft(cls: type) -> bool:
    """Whether the modules of a class are layers that PEFT puts into a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return issubclass(cls, (BaseTunerLayer, AuxiliaryTrainingWrapper))
