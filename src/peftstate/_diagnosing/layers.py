"""Layers of the base model: how they are quantized, and what is merged into them.

What is quantized cannot be cast into what is quantized in another way. So such a layer is taken
whole from the user's model, with what PEFT has around it, and is given the exact reload's adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from peftstate._diagnosing.pair import Difference, Pair, key, put, usual
from peftstate.sections import _bitsandbytes, _merges
from peftstate.sections._bitsandbytes import LayerSettings, LayerState
from peftstate.sections._bitsandbytes_forms import is_linear
from peftstate.sections._peft_layers import original_key
from peftstate.sections._tensors import dtype_named
from peftstate.sections._view import ModelView

QUANTIZATION_REMEDY = (
    "Load the base model with the quantization_config that it had: base_model_kwargs(adapter), "
    "or `peftstate base-args`."
)
_OF_A_LAYER = ("_active_adapter", "_disable_adapters", "scaling")
"""What PEFT notes on each layer of which adapters it applies, and how strongly."""


def quantization(pair: Pair) -> Iterator[Difference]:
    """Layers that are quantized in another way, or only in one of the models."""
    saved, found = _kinds(pair.exact), _kinds(pair.users)
    names = requantized(pair)
    if not names:
        return
    one, other = usual((saved[name], found[name]) for name in names)
    both = isinstance(one, LayerSettings) and isinstance(other, LayerSettings)
    yield Difference(
        name="quantization type" if both else "quantization",
        section="quantization",
        saved=_in_words(one, other),
        found=_in_words(other, one),
        remedy=QUANTIZATION_REMEDY,
        give=partial(swap, pair, names),
    )


def requantized(pair: Pair) -> list[str]:
    """Names of the layers that are quantized in another way, or only in one of the models.

    A merge quantizes anew, with settings of PEFT's choice; that is left to `merges`.
    """
    saved, found = _kinds(pair.exact), _kinds(pair.users)
    merged = set(merged_otherwise(pair))
    return sorted(
        name
        for name in saved.keys() & found.keys()
        if saved[name] != found[name]
        if name not in merged or _type(saved[name]) != _type(found[name])
    )


def _type(kind: LayerSettings | tuple[str, str]) -> object:
    """What no merge changes of how a layer is quantized."""
    return (kind.kind, kind.quant_type) if isinstance(kind, LayerSettings) else kind


def _kinds(view: ModelView) -> dict[str, LayerSettings | tuple[str, str]]:
    """How each module that has a weight is quantized; of others their class, and the weight's."""
    return {
        name: _bitsandbytes.settings_of(module)
        or (type(module).__name__, type(getattr(module, "weight", None)).__name__)
        for name, module in view.base_modules()
        if module._parameters or module._buffers
    }


def _in_words(kind: LayerSettings | tuple[str, str], other: object) -> str:
    """How a layer is quantized, in as many words as tell it from another one."""
    if not isinstance(kind, LayerSettings):
        return "none" if kind[0] in ("Linear", "Conv1D", "Embedding") else kind[0]
    words = [kind.quant_type or {"Linear8bitLt": "int8"}.get(kind.kind, kind.kind)]
    if isinstance(other, LayerSettings) and kind.kind == other.kind:
        words += [
            f"{name} {getattr(kind, name)}"
            for name in ("blocksize", "double_quant", "dtype", "threshold")
            if getattr(kind, name) != getattr(other, name)
        ]
    return ", ".join(words)


def compute_dtype(pair: Pair) -> Iterator[Difference]:
    """The dtype that 4-bit layers multiply in."""
    saved, found = _computing(pair.exact), _computing(pair.users)
    names = [
        name
        for name in saved.keys() & found.keys()
        if _computes(saved[name]) != _computes(found[name])
    ]
    if not names:
        return

    def give() -> None:
        layers = dict(pair.exact.base_modules())
        for name in names:
            _bitsandbytes.set_compute_dtype(layers[name], found[name])

    yield Difference(
        name="compute dtype",
        section="quantization",
        saved=usual(_computes(saved[name]) for name in names),
        found=usual(_computes(found[name]) for name in names),
        remedy=QUANTIZATION_REMEDY,
        give=give,
    )


def _computing(view: ModelView) -> dict[str, LayerState]:
    """What is set on each 4-bit linear layer, the only kind that has a compute dtype."""
    states = {
        name: _bitsandbytes.state_of(module)
        for name, module in view.base_modules()
        if is_linear(module)
    }
    return {name: state for name, state in states.items() if state is not None}


def _computes(state: LayerState) -> str:
    """What a layer computes in, in words."""
    return str(state.compute_dtype) if state.compute_dtype_is_set else "that of its input"


def merges(pair: Pair) -> Iterator[Difference]:
    """Layers that an adapter is merged into, in one of the models only."""
    names = [name for name in merged_otherwise(pair) if name not in requantized(pair)]
    if not names:
        return
    yield Difference(
        name="merged adapters",
        section="adapters",
        saved=_merged(pair.exact),
        found=_merged(pair.users),
        remedy="Load with peftstate, which merges what was merged.",
        give=partial(swap, pair, names),
    )


def merged_otherwise(pair: Pair) -> list[str]:
    """Names of the modules that an adapter is merged into in one of the models only."""
    saved, found = (
        {site.name for site in view.sites() if site.part == "base" and site.merged}
        for view in (pair.exact, pair.users)
    )
    return sorted(saved ^ found)


def _merged(view: ModelView) -> str:
    """The adapters that are merged."""
    return ", ".join(_merges.order_of(_merges.merged_layers(view.model))) or "none"


def swap(pair: Pair, names: Collection[str]) -> None:
    """Put layers of the user's model in place of the exact reload's, but for their adapters.

    Args:
        pair: The models.
        names: The layers' names in the base model.

    Raises:
        LookupError: The user's model does not have one, or not all its adapters.
    """
    adapters = {key(site): site.tensor for site in pair.exact.tensors() if site.part == "adapter"}
    dtypes = {name: _dtype(pair.exact, name) for name in names}
    computing = _computing(pair.exact)
    ours, theirs = _places(pair.exact), _places(pair.users)
    for name in names:
        if name not in theirs:
            raise LookupError(f"the model as it was loaded has no {name}")
        (parent, leaf), (other, other_leaf) = ours[name], theirs[name]
        layer = other._modules[other_leaf]
        _take_over_state(parent._modules[leaf], layer)
        parent._modules[leaf] = layer
    missing = adapters.keys() - {key(site) for site in pair.exact.tensors()}
    if missing:
        raise LookupError(f"the model as it was loaded has no {min(missing, key=str)[2]}")
    _give_back(pair, adapters, dtypes)
    for name, module in pair.exact.base_modules():
        if name in dtypes and name in computing:
            _bitsandbytes.set_compute_dtype(module, computing[name])


def _places(view: ModelView) -> dict[str, tuple[nn.Module, str]]:
    """Where each layer hangs, with what PEFT has around it: in which module, under which name."""
    parents = {
        id(child): (module, name)
        for module in view.base.modules()
        for name, child in module._modules.items()
    }
    found = {}
    for name, module in view.base_modules():
        place = parents.get(id(module))
        while place is not None and original_key(place[0]) == place[1]:
            place = parents.get(id(place[0]))
        if place is not None:
            found[name] = place
    return found


def _take_over_state(ours: Any, theirs: Any) -> None:
    """Have a layer of PEFT apply the adapters that another one applies."""
    for name in _OF_A_LAYER:
        if name in vars(ours) and name in vars(theirs):
            vars(theirs)[name] = copy.copy(vars(ours)[name])


def _give_back(
    pair: Pair, adapters: dict[Any, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> None:
    """Give layers that were taken over the exact reload's adapters, and its dtypes."""
    for site in pair.exact.tensors():
        if site.part == "adapter" and key(site) in adapters:
            if adapters[key(site)] is not site.tensor:
                put(site, adapters[key(site)])
        elif site.part == "base" and site.tensor.is_floating_point():
            dtype = dtypes.get(site.name.removesuffix(f".{site.leaf}"))
            if dtype is not None and not _bitsandbytes.kind_of(site.module):
                put(site, site.tensor, dtype=dtype)


def _dtype(view: ModelView, name: str) -> torch.dtype:
    """The dtype that a layer would have without quantization."""
    module: Any = dict(view.base_modules())[name]
    settings = _bitsandbytes.settings_of(module)
    if settings is not None:
        named = settings.dtype or _usual_dtype(view.base)
        return dtype_named(named) if isinstance(named, str) else named
    weight: torch.Tensor | None = getattr(module, "weight", None)
    is_plain = weight is not None and weight.is_floating_point()
    return weight.dtype if is_plain and weight is not None else _usual_dtype(view.base)


def _usual_dtype(base: nn.Module) -> torch.dtype:
    """The dtype that most tensors of a model have."""
    return usual(p.dtype for p in base.parameters() if p.is_floating_point())
