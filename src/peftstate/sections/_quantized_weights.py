"""Quantized weights that no load brings about again, kept as bitsandbytes holds them.

That is what an adapter was merged into in a way that cannot be repeated, and what an initialisation
such as OLoRA rewrote.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from peftstate.sections import _bitsandbytes
from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections._tensors import SidecarTensor, dtype_name, dtype_named

if TYPE_CHECKING:
    import torch
    from torch import nn

_KINDS = frozenset({"Linear4bit", "Linear8bitLt"})
"""The layers that PEFT merges into."""


@attrs.frozen(kw_only=True)
class QuantizedWeight:
    """A quantized weight as bitsandbytes holds it.

    Attributes:
        form: ``"fresh"``, ``"packed"`` or ``"unpacked"``, as in `quantization`.
        dtype: The dtype that a 4-bit weight was quantized from; `None` for 8 bit.
        tensors: The weight and its scales, by their names in bitsandbytes.
    """

    form: str
    dtype: str | None
    tensors: Mapping[str, SidecarTensor]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> QuantizedWeight:
        """Describe the weight of a layer, which must be one that `can_keep` knows.

        Args:
            name: What the names of its tensors in the sidecar begin with.
            module: The layer.
        """
        settings = _bitsandbytes.settings_of(module)
        return cls(
            form=forms.form_of(module),
            dtype=None if settings is None else settings.dtype,
            tensors={
                key: SidecarTensor.of(f"{name}.{key}", tensor)
                for key, tensor in _tensors(module).items()
            },
        )

    def put_back(self, module: nn.Module) -> None:
        """Give a layer this weight, if it can be in the saved form on this machine."""
        if forms.is_linear(module):
            self._put_back_4bit(module)
        else:
            self._put_back_8bit(module)

    def _put_back_4bit(self, module: nn.Module) -> None:
        """Give a 4-bit layer this weight: its own quantization state, with the saved tensors."""
        if not (forms.can_hold(module, self.form) and forms.can_compute(module, self.form)):
            return  # the comparison tells
        layer: Any = module
        device = layer.weight.device
        tensors = {key: saved.load().to(device) for key, saved in self.tensors.items()}
        dtype = None if self.dtype is None else dtype_named(self.dtype)
        before = forms.in_form(module, self.form, dtype=dtype)
        _check_fits(before, tensors)
        state = copy.copy(before.state)
        vars(state).pop(forms.BEFORE_PACKING, None)
        state.absmax = tensors["absmax"]
        if state.nested:
            state.state2 = copy.copy(state.state2)
            state.state2.absmax, state.offset = tensors["state2.absmax"], tensors["offset"]
        forms.assign(module, forms.Weight4bit(tensors["data"], state))

    def _put_back_8bit(self, module: nn.Module) -> None:
        """Give an 8-bit layer this weight, as one that has not run holds it."""
        layer: Any = module
        tensors = {key: saved.load().to(layer.weight.device) for key, saved in self.tensors.items()}
        _check_alike(tensors, _tensors(module))
        layer.weight.data = layer.weight.CB = tensors["CB"]
        layer.weight.SCB = tensors["SCB"]
        layer.state.reset_grads()  # in which a layer that has run holds its weight


def _check_fits(weight: forms.Weight4bit, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that cannot stand for a weight of this shape: kernels would read beyond them.

    Raises:
        ValueError: They cannot.
    """
    nested = {"state2.absmax", "offset"} & tensors.keys()
    expected = {"data": weight.data, "absmax": weight.state.absmax}
    if weight.state.nested:
        expected |= {"state2.absmax": weight.state.state2.absmax, "offset": weight.state.offset}
    elif nested:
        raise ValueError("the scales of the saved weight are quantized, those of the layer are not")
    _check_alike(tensors, expected)


def _check_alike(tensors: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that have not the dtypes and the shapes of others.

    Raises:
        ValueError: One has not.
    """
    for key, tensor in live.items():
        if tensors[key].dtype != tensor.dtype or tensors[key].shape != tensor.shape:
            raise ValueError(
                f"the saved weight's {key} is {_kind(tensors[key])}, not {_kind(tensor)}"
            )


def _kind(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape."""
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def can_keep(module: nn.Module) -> bool:
    """Whether a module is a quantized layer whose weight can be kept as it is."""
    return _bitsandbytes.kind_of(module) in _KINDS and bool(_bitsandbytes.canonical_tensors(module))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, by their names in bitsandbytes."""
    if not forms.is_linear(module):
        found = _bitsandbytes.canonical_tensors(module) or {}
        return {"CB": found["weight"](), "SCB": found["weight.SCB"]()}
    weight = forms.weight_of(module)
    tensors = {"data": weight.data, "absmax": weight.state.absmax}
    if weight.state.nested:
        tensors |= {"state2.absmax": weight.state.state2.absmax, "offset": weight.state.offset}
    return tensors
