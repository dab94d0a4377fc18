"""A base model as it is, to put it back if a load fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from typing import Any

import attrs
import torch
from torch import nn

from peftstate._modules import modules_of, shared_modules_of


@attrs.frozen
class _Attributes:
    """The attributes of an object.

    Attributes:
        owner: Where they are.
        values: What they were.
        contents: What was in containers among them; empty ones of `_PLAIN` are left out, as most
            of a module's are.
    """

    owner: dict[str, Any]
    values: dict[str, Any]
    contents: dict[str, Any]

    @classmethod
    def of(cls, owner: Any) -> _Attributes:
        attributes = vars(owner)
        contents = {
            name: value.copy()
            for name, value in attributes.items()
            if _IS_CONTAINER[value.__class__] and (value.__class__ not in _PLAIN or value)
        }
        return cls(attributes, attributes.copy(), contents)

    def restore(self) -> None:
        """Put the attributes back; a container stays the object that others may refer to."""
        for name, value in self.values.items():
            if name in self.contents:
                _put_back(value, self.contents[name])
            elif value.__class__ in _PLAIN:
                _put_back(value, value.__class__())
        _put_back(self.owner, self.values)


_PLAIN: frozenset[type] = frozenset({dict, OrderedDict, list, set})
"""Containers that are true if something is in them, which is not so of every other class."""


class _IsContainer(dict[type, bool]):
    """Whether the objects of a class hold others, and can be copied.

    A load asks of ten thousand attributes, and a dictionary answers in half the time of a function.
    """

    def __missing__(self, cls: type) -> bool:
        kinds = (MutableMapping, MutableSequence, MutableSet)
        self[cls] = found = issubclass(cls, kinds) and hasattr(cls, "copy")
        return found


_IS_CONTAINER = _IsContainer()


def _put_back(container: Any, content: Any) -> None:
    """Make a container hold again what it held.

    What did not change is never missing meanwhile: another thread may be running the model.
    """
    if isinstance(container, MutableMapping):
        _put_back_items(container, content)
    elif isinstance(container, MutableSet):
        container |= content - container
        container &= content
    elif isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.extend(content)


def _put_back_items(mapping: MutableMapping[Any, Any], items: Mapping[Any, Any]) -> None:
    """Make a mapping hold again what it held, in the same order."""
    for key, value in items.items():
        if key not in mapping or mapping[key] is not value:
            mapping[key] = value
    for key in [key for key in mapping if key not in items]:
        del mapping[key]
    if list(mapping) != list(items):
        mapping.clear()
        mapping.update(items)


@attrs.frozen
class Snapshot:
    """The modules of a model, what hangs on them, and the data of its tensors.

    It holds references only, no copies: what a load changes, it changes by putting something else
    in its place (PEFT injects layers, casts replace data). Where PEFT writes into a tensor, the
    load gives it other memory first.
    """

    attributes: tuple[_Attributes, ...]
    tensors: tuple[tuple[torch.Tensor, torch.Tensor, bool], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Take a snapshot."""
        modules = modules_of(model)
        tensors = {id(tensor): tensor for module in modules for tensor in _tensors(module)}
        owners = [*modules, *_configs(model), *_peft_configs(model)]
        inner = [getattr(tensor, "quant_state", None) for tensor in tensors.values()]
        inner += [getattr(module, "state", None) for module in modules]  # of 8-bit layers
        owners += [
            owner
            for owner in (*tensors.values(), *inner)
            if hasattr(owner, "__dict__") and vars(owner)
        ]
        return cls(
            tuple(_Attributes.of(owner) for owner in owners),
            tuple((tensor, tensor.data, tensor.requires_grad) for tensor in tensors.values()),
        )

    @classmethod
    def of_configs(cls, model: nn.Module) -> Snapshot:
        """Take a snapshot of nothing but the configs of a PEFT model's adapters."""
        return cls(tuple(_Attributes.of(config) for config in _peft_configs(model)), ())

    def restore(self) -> None:
        """Put everything back."""
        for attributes in self.attributes:
            attributes.restore()
        for tensor, data, requires_grad in self.tensors:
            tensor.data = data
            tensor.requires_grad_(requires_grad)


@attrs.frozen
class AddingSnapshot:
    """What of a PEFT model may change while one more adapter is put beside the others.

    Of those it notes what is trainable and in train mode; what adapters hold stays as it is.
    """

    model: nn.Module
    attributes: tuple[_Attributes, ...]
    training: tuple[nn.Module, ...]
    trainable: frozenset[int]

    @classmethod
    def of(cls, model: nn.Module) -> AddingSnapshot:
        """Take a snapshot."""
        modules = modules_of(model)
        owners = [*shared_modules_of(model), *_configs(model), *_peft_configs(model)]
        tensors = (tensor for module in modules for tensor in _tensors(module))
        return cls(
            model,
            tuple(_Attributes.of(owner) for owner in owners),
            tuple(module for module in modules if module.training),
            frozenset(id(tensor) for tensor in tensors if tensor.requires_grad),
        )

    def restore(self) -> None:
        """Put everything back."""
        for attributes in self.attributes:
            attributes.restore()
        for module in self.training:
            module.training = True
        for module in modules_of(self.model):
            for tensor in _tensors(module):
                tensor.requires_grad_(id(tensor) in self.trainable)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers of one module itself."""
    held = (*module._parameters.values(), *module._buffers.values())
    return (tensor for tensor in held if tensor is not None)


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configs, which PEFT and the sections edit."""
    config = getattr(model, "config", None)
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    for found in (config, getattr(model, "generation_config", None), *inner):
        if hasattr(found, "__dict__"):
            yield found


def _peft_configs(model: nn.Module) -> list[Any]:
    """The configs of the adapters."""
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []
