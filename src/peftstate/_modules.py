"""The modules of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of a model, in the order of ``model.modules()``.

    That one hands each module up through all that it is in, which takes several times as long.
    """
    found: dict[int, nn.Module] = {}
    todo: list[nn.Module] = [model]
    while todo:
        module = todo.pop()
        if id(module) not in found:
            found[id(module)] = module
            todo.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(found.values())
