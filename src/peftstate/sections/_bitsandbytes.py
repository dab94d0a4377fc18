"""What peftstate knows of the insides of bitsandbytes.

A layer of bitsandbytes changes when it runs. An 8-bit layer moves its weight and the scales from
the parameter to ``module.state``, a 4-bit layer on some CPUs takes another form (see
`_bitsandbytes_forms`), and both cast their bias for good.

Nothing here imports bitsandbytes before a layer of its is seen: a process that has not imported it
holds none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import attrs

from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections._tensors import dtype_name, dtype_named, is_readable

if TYPE_CHECKING:
    import torch
    from torch import nn

PARAMETRIZATION = "Bnb4bitParametrization"
_KINDS = {
    "Linear4bit": "bitsandbytes.nn",
    "Linear8bitLt": "bitsandbytes.nn",
    "Embedding4bit": "bitsandbytes.nn",
    "Embedding8bit": "bitsandbytes.nn",
    PARAMETRIZATION: "bitsandbytes.nn.parametrize",
}
_COMPUTE_DTYPES = frozenset({"bfloat16", "float16", "float32"})


@attrs.frozen(kw_only=True)
class LayerSettings:
    """How a layer is quantized. What a kind of layer does not have is `None`.

    Attributes:
        kind: The class of bitsandbytes', such as ``"Linear4bit"``, also for subclasses of it.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: How many weights share a scale.
        double_quant: Whether the scales are quantized in turn.
        dtype: The dtype that the weights were quantized from; of an embedding, that it gives.
        threshold: Activations above it run in 16 bit.
        has_fp16_weights: Whether the weights are quantized at each forward only.
    """

    kind: str
    quant_type: str | None = None
    blocksize: int | None = None
    double_quant: bool | None = None
    dtype: str | None = None
    threshold: float | None = None
    has_fp16_weights: bool | None = None


@attrs.frozen(kw_only=True)
class LayerState:
    """What can be set on a quantized layer.

    Attributes:
        compute_dtype: The dtype that a 4-bit layer multiplies in.
        compute_dtype_is_set: Whether it stays so; if not, the next input decides it.
        form: ``"fresh"``, ``"packed"`` or ``"unpacked"``.
    """

    compute_dtype: str | None
    compute_dtype_is_set: bool
    form: str


def knows_parametrizations() -> bool:
    """Whether anything in this process can be a 4-bit parameter that is no layer's weight."""
    return _KINDS[PARAMETRIZATION] in sys.modules


def kind_of(module: nn.Module) -> str | None:
    """The class of bitsandbytes' that a module is of; `None` for any other module."""
    cls: type = type(module)
    return _kind_of_class(cls)


@cache
def _kind_of_class(cls: type) -> str | None:
    """`kind_of` of the modules of a class; whoever made a subclass has imported bitsandbytes."""
    for kind, home in _KINDS.items():
        found = getattr(sys.modules.get(home), kind, None)
        if found is not None and issubclass(cls, found):
            return kind
    return None


def settings_of(module: nn.Module) -> LayerSettings | None:
    """How a layer is quantized; `None` if it is not of bitsandbytes."""
    kind, layer = kind_of(module), _attributes(module)
    if kind is None:
        return None
    if kind == "Embedding8bit":
        return LayerSettings(kind=kind, dtype=_name(layer.dtype))
    if kind == "Linear8bitLt":
        return LayerSettings(
            kind=kind,
            threshold=float(layer.state.threshold),
            has_fp16_weights=bool(layer.state.has_fp16_weights),
        )
    return _settings_4bit(kind, layer)


def _settings_4bit(kind: str, layer: Any) -> LayerSettings:
    """How a 4-bit layer is quantized."""
    state = forms.quant_state(layer)
    if state is None:  # not quantized yet, so the weight says how it will be
        return LayerSettings(
            kind=kind,
            quant_type=getattr(layer.weight, "quant_type", None),
            blocksize=getattr(layer.weight, "blocksize", None),
            double_quant=bool(getattr(layer.weight, "compress_statistics", False)),
        )
    packed = forms.form_of_state(state) == forms.PACKED
    return LayerSettings(
        kind=kind,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        double_quant=bool(state.original_nested if packed else state.nested),
        dtype=_name(getattr(state, forms.dtype_attribute(state))),
    )


def dtype_quantized_from(module: nn.Module) -> str | None:
    """The name of the dtype that a 4-bit weight was quantized from; `None` of another module."""
    state = forms.quant_state(module)
    return None if state is None else _name(getattr(state, forms.dtype_attribute(state)))


def state_of(module: nn.Module) -> LayerState | None:
    """What can be set on a layer; `None` if it is not of bitsandbytes."""
    if kind_of(module) is None:
        return None
    layer = _attributes(module)
    linear = forms.is_linear(module)
    return LayerState(
        compute_dtype=_name(layer.compute_dtype) if linear else None,
        compute_dtype_is_set=linear and bool(layer.compute_type_is_set),
        form=forms.form_of(module),
    )


def set_compute_dtype(module: nn.Module, state: LayerState) -> None:
    """Set the dtype that a 4-bit layer computes in, if it is one that a manifest may set."""
    layer, name = _attributes(module), state.compute_dtype
    if forms.is_linear(module) and (name is None or name in _COMPUTE_DTYPES):
        layer.compute_dtype = None if name is None else dtype_named(name)
        layer.compute_type_is_set = state.compute_dtype_is_set


def canonical_tensors(module: nn.Module) -> Mapping[str, Callable[[], torch.Tensor]] | None:
    """The quantized weight of a layer, in tensors that running the layer does not change.

    A 4-bit layer gives its nibbles in their original order, the scales un-nested and rounded to
    bfloat16, and the shape; they are the same fresh and packed. An unpacked layer has other
    scales. An 8-bit layer gives its weight and its scales.

    Args:
        module: Any module.

    Returns:
        What makes each tensor, by its name, for that takes work; `None` if the module is no layer
        of bitsandbytes, or one that keeps its weight in 16 bit; empty if the weight cannot be read
        now (not yet quantized, on the meta device, sharded). A bias is not among them: a forward
        casts it, for good, so it is to be compared in the dtype that it was saved in.
    """
    kind, layer = kind_of(module), _attributes(module)
    if kind is None:
        return None
    if kind in ("Linear8bitLt", "Embedding8bit"):
        return _canonical_8bit(layer)
    state = forms.quant_state(module)
    if state is None or not is_readable(state.absmax):
        return {}
    if kind == PARAMETRIZATION:  # the nibbles are a parameter of the module around it
        return _canonical_scales(state)
    if not is_readable(layer.weight):
        return {}
    scales = {f"weight.{key}": make for key, make in _canonical_scales(state).items()}
    return {"weight": partial(_nibbles, module), **scales}


def _nibbles(module: nn.Module) -> torch.Tensor:
    """The nibbles of a 4-bit layer as they are in a fresh one."""
    return forms.original_order(forms.weight_of(module))


def scales_of(module: nn.Module, tensor: torch.Tensor) -> list[torch.Tensor]:
    """What beside a tensor makes up the quantized weight that it is part of, if it is.

    Args:
        module: The module that holds the weight.
        tensor: The weight, or the scales of one that is no parameter of the module.
    """
    if kind_of(module) is None:
        return []
    state = forms.quant_state(module)
    if tensor is not getattr(module, "weight", None) and tensor is not getattr(
        state, "absmax", None
    ):
        return []
    if state is not None:
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        return [part for part in (state.absmax, *nested) if part is not tensor]
    held = [getattr(getattr(module, "state", None), key, None) for key in ("CB", "SCB")]
    return [part for part in (*held, getattr(tensor, "SCB", None)) if part is not None]


def _canonical_scales(state: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """The scales and the shape of a 4-bit weight."""
    import torch

    shape = partial(torch.tensor, tuple(state.shape), dtype=torch.int64)
    return {"absmax": partial(_absmax, state), "shape": shape}


def _absmax(state: Any) -> torch.Tensor:
    """The scales of a 4-bit weight, un-nested and rounded to bfloat16."""
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    absmax: torch.Tensor = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    elif forms.form_of_state(state) == forms.PACKED:
        absmax = absmax.T
    return absmax.reshape(-1).to(torch.bfloat16)


def _canonical_8bit(layer: Any) -> dict[str, Callable[[], torch.Tensor]] | None:
    """The weight and the scales of an 8-bit layer, wherever they are."""
    import torch

    if getattr(layer.weight, "has_fp16_weights", False):
        return None
    state = getattr(layer, "state", None)  # an embedding has none
    data, scale = getattr(state, "CB", None), getattr(state, "SCB", None)
    if data is None or scale is None:  # it has not run yet
        data, scale = layer.weight.data, getattr(layer.weight, "SCB", None)
    if data.dtype != torch.int8 or scale is None or not (is_readable(data) and is_readable(scale)):
        return {}
    return {"weight": lambda: data, "weight.SCB": lambda: scale}


def _attributes(module: nn.Module) -> Any:
    """A module whose attributes have no declared type."""
    return module


def _name(dtype: torch.dtype | None) -> str | None:
    """The name of a dtype in a manifest."""
    return None if dtype is None else dtype_name(dtype)
