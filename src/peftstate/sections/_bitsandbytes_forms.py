"""The forms that a 4-bit layer of bitsandbytes goes through.

On a CPU with AVX512-BF16 a 4-bit layer is packed by its first forward in eval mode
(``bitsandbytes/nn/modules.py::Linear4bit.forward``): the nibbles change places, the scales
(``absmax``) are un-nested and rounded to bfloat16. ``state_dict()`` undoes that, but badly
(``_save_to_state_dict``): the nibbles come back, while the scales are nested anew from the rounded
ones or, without double quantization, stay transposed. So a layer has a *form*:

- ``"fresh"``: as it was quantized;
- ``"packed"``: has run in eval mode;
- ``"unpacked"``: was packed, and then ``state_dict()`` was called.

A fresh layer that is packed, or packed and unpacked, in the same way is the same to the last bit,
so a form can be restored. How often a layer went around does not show on it; it is left to try.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs

from peftstate.sections._tensors import is_readable

if TYPE_CHECKING:
    import torch
    from torch import nn

FRESH: Final = "fresh"
PACKED: Final = "packed"
UNPACKED: Final = "unpacked"

MAX_CYCLES = 8
"""Times that a layer may have been packed before it is given up to find out how often."""

BEFORE_PACKING = "_peftstate_before_packing"
"""The attribute of a `QuantState` under which `remember_fresh` keeps a copy of it."""

_BLOCK_ROWS = 32  # the `block_n` of bitsandbytes' packing, by which the rows must be divisible


@attrs.frozen
class Weight4bit:
    """The weight of a 4-bit layer: its nibbles and bitsandbytes' `QuantState`."""

    data: torch.Tensor
    state: Any


@attrs.frozen
class _Packing:
    """bitsandbytes' functions that pack and unpack a weight."""

    pack: Callable[..., tuple[torch.Tensor, Any]]
    unpack: Callable[..., tuple[torch.Tensor, Any]]


def _packing() -> _Packing | None:
    """The functions, which bitsandbytes has since 0.49; their absence means that nothing packs."""
    functional = sys.modules.get("bitsandbytes.functional")
    pack = getattr(functional, "_convert_weight_packed_for_cpu", None)
    unpack = getattr(functional, "_convert_weight_packed_for_cpu_inverse", None)
    return None if pack is None or unpack is None else _Packing(pack, unpack)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a 4-bit linear layer, the only kind that is ever packed."""
    cls = getattr(sys.modules.get("bitsandbytes.nn"), "Linear4bit", None)
    return cls is not None and isinstance(module, cls)


def quant_state(module: nn.Module) -> Any:
    """The `QuantState` of a 4-bit layer; `None` before it is quantized."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    # FSDP loses the attribute of the parameter; bitsandbytes then takes the module's
    return state if state is not None else getattr(module, "quant_state", None)


def weight_of(module: nn.Module) -> Weight4bit:
    """The weight of a quantized 4-bit layer."""
    layer: Any = module
    return Weight4bit(layer.weight.data, quant_state(module))


def form_of(module: nn.Module) -> str:
    """The form of a layer: ``"fresh"`` for everything but a 4-bit layer that was packed."""
    return form_of_state(quant_state(module)) if is_linear(module) else FRESH


def form_of_state(state: Any) -> str:
    """The form of a `QuantState`: packing sets a mark, and unpacking sets it back to `False`."""
    packed = getattr(state, "packing_format_for_cpu", None)
    if packed is None:
        return FRESH
    return PACKED if packed else UNPACKED


def dtype_attribute(state: Any) -> str:
    """Where a `QuantState` has the dtype that its weight was quantized from."""
    return "original_dtype" if form_of_state(state) == PACKED else "dtype"


def can_compute(module: nn.Module, form: str) -> bool:
    """Whether it can be worked out what a layer would be in a form."""
    current = form_of(module)
    if form == current:
        return True
    if form not in (PACKED, UNPACKED) or current == UNPACKED or not is_linear(module):
        return False
    layer: Any = module
    state = quant_state(module)
    if state is None or _packing() is None or not is_readable(layer.weight):
        return False
    rows, columns = state.shape
    return bool(rows % _BLOCK_ROWS == 0 and columns % state.blocksize == 0)


def can_hold(module: nn.Module, form: str) -> bool:
    """Whether a layer can be in a form on this machine; only some CPUs run a packed one."""
    layer: Any = module
    runs_packed = bool(getattr(layer, "support_avx512bf16_for_cpu", False))
    return form != PACKED or (layer.weight.device.type == "cpu" and runs_packed)


def in_form(
    module: nn.Module, form: str, *, cycles: int = 1, dtype: torch.dtype | None = None
) -> Weight4bit:
    """What the weight of a layer would be in a form; the layer is left as it is.

    Args:
        module: A 4-bit layer.
        form: The form.
        cycles: How often the layer was packed to get there.
        dtype: The dtype that the weight was quantized from, if not that which the layer notes.

    Raises:
        ValueError: `can_compute` does not hold.
    """
    current, weight = form_of(module), weight_of(module)
    if dtype is not None:
        weight = attrs.evolve(weight, state=copy.copy(weight.state))
        setattr(weight.state, dtype_attribute(weight.state), dtype)
    if form == current:
        return weight
    packing = _packing()
    if packing is None or not can_compute(module, form):
        raise ValueError(f"a 4-bit layer that is {current} cannot be brought into form {form!r}")
    device = weight.data.device
    if device.type != "cpu":  # the layer that was saved was on a CPU, whose rounding counts
        weight = _moved(weight, "cpu")
    steps = [packing.pack, packing.unpack] * cycles
    first = 1 if current == PACKED else 0
    last = len(steps) - 1 if form == PACKED else len(steps)
    for step in steps[first:last]:
        # each step makes new tensors, and sets them on the state that it is given
        weight = Weight4bit(*step(weight.data, copy.copy(weight.state)))
    return weight if device.type == "cpu" or form == PACKED else _moved(weight, device)


def original_order(weight: Weight4bit) -> torch.Tensor:
    """The nibbles of a weight as they are in a fresh one, two a byte."""
    import torch

    data, packing = weight.data, _packing()
    if packing is not None and form_of_state(weight.state) == PACKED:
        state = copy.copy(weight.state)
        state.original_nested = False  # spares nesting the scales
        data, _ = packing.unpack(data, state)
    return data.detach().contiguous().view(torch.uint8).reshape(-1)


def assign(module: nn.Module, weight: Weight4bit) -> None:
    """Give a 4-bit layer another weight."""
    layer: Any = module
    layer.weight.data = weight.data
    layer.weight.quant_state = weight.state
    layer.quant_state = weight.state


def convert(module: nn.Module, form: str, *, cycles: int = 1) -> None:
    """Bring a layer into a form, of which `can_compute` and `can_hold` must hold."""
    if form != form_of(module):
        assign(module, in_form(module, form, cycles=cycles))


def remember_fresh(modules: Iterable[nn.Module]) -> None:
    """Keep the state of fresh layers that will be packed, which rounds their scales.

    It is kept with the `QuantState` that packing changes.
    """
    for module in modules:
        if is_linear(module) and form_of(module) == FRESH and can_hold(module, PACKED):
            state = quant_state(module)
            if state is not None and not hasattr(state, BEFORE_PACKING):
                setattr(state, BEFORE_PACKING, copy.copy(state))


def make_trainable(modules: Iterable[nn.Module]) -> None:
    """Bring packed layers into the form they had before: no gradient goes through a packed one.

    Where that was not kept they are unpacked, as by ``state_dict()``.
    """
    for module in modules:
        if form_of(module) != PACKED or not can_compute(module, UNPACKED):
            continue
        weight = in_form(module, UNPACKED)
        before = getattr(weight.state, BEFORE_PACKING, None)
        if before is not None and before.absmax.device == weight.data.device:
            weight = attrs.evolve(weight, state=copy.copy(before))
        assign(module, weight)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Keep packed layers as they are, although ``state_dict()`` is called inside."""
    packed = [
        (module, attrs.evolve(weight, state=copy.copy(weight.state)))
        for module in model.modules()
        if form_of(module) == PACKED
        for weight in [weight_of(module)]
    ]
    try:
        yield
    finally:
        for module, weight in packed:
            assign(module, weight)


def scales(weight: Weight4bit) -> list[torch.Tensor]:
    """The tensors of a weight that a change of its form rounds."""
    state = weight.state
    return [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]


def _moved(weight: Weight4bit, device: torch.device | str) -> Weight4bit:
    """A copy of a weight that is not packed, on another device."""
    state = copy.deepcopy(weight.state)
    state.to(device)
    return Weight4bit(weight.data.to(device), state)
