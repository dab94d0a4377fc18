"""Faults of what the adapter is loaded onto: the base model, the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks._faults.fault import Fault
from benchmarks._faults.scene import Case, load_base, lora_config, write_checkpoint
from peftstate.errors import (
    AdapterMismatchError,
    BaseModelMismatchError,
    PeftStateError,
    PredictionMismatchError,
    QuantizationMismatchError,
)

WEIGHT = "model.layers.0.mlp.up_proj.weight"
"""The base tensor that is changed."""


def _base(
    change: Callable[[Any], Any] = lambda base: base, **options: Any
) -> Callable[[Case], None]:
    """The base model loaded with other options, or changed after it was loaded."""

    def inject(case: Case) -> None:
        def load() -> nn.Module:
            base = load_base(case.saved.checkpoint, **options)
            changed: nn.Module = change(base) or base
            return changed

        case.base = load

    return inject


def _other_checkpoint(case: Case) -> None:
    """Another base model of the same shapes."""
    case.base = lambda: load_base(case.saved.other_checkpoint)


def _checkpoint_with(**fields: Any) -> Callable[[Case], None]:
    """A base model of the same seed, but of another config."""

    def inject(case: Case) -> None:
        folder = write_checkpoint(case.folder.parent / "checkpoint", seed=0, **fields)
        case.base = lambda: load_base(folder)

    return inject


def _perturbed(base: Any) -> None:
    """One base tensor is changed a little."""
    with torch.no_grad():
        base.get_parameter(WEIGHT).mul_(1.01)


def _one_bit(base: Any) -> None:
    """One bit of one base tensor is flipped."""
    values = base.get_parameter(WEIGHT).data.view(-1).view(torch.int32)
    values[7] ^= 1


def _swapped_layers(base: Any) -> None:
    """Two layers have changed places."""
    layers = base.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def _merged(base: Any) -> Any:
    """Another adapter is merged into the base model."""
    import peft

    torch.manual_seed(9)
    return peft.get_peft_model(base, lora_config()).merge_and_unload()


def _wrapped(base: Any) -> Any:
    """Another adapter is on the base model already."""
    import peft

    torch.manual_seed(9)
    return peft.get_peft_model(base, lora_config(target_modules=["o_proj"])).base_model.model


def _resized(base: Any) -> None:
    """The vocabulary has grown."""
    base.resize_token_embeddings(70, mean_resizing=False)


def _in_double(base: Any) -> Any:
    """Everything is in fp64, which holds the same values."""
    return base.double()


def _with_hook(base: Any) -> None:
    """One layer's output is scaled by a forward hook."""
    base.model.layers[0].register_forward_hook(_double)


def _double(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """The output of a layer, doubled."""
    if isinstance(output, tuple):
        return (2 * output[0], *output[1:])
    return 2 * output


def _fault(
    key: str,
    what: str,
    inject: Callable[[Case], object],
    error: type[PeftStateError] = BaseModelMismatchError,
    names: str = "base_model.tensors",
) -> Fault:
    """A base model that must be refused."""
    return Fault(key=key, what=what, inject=inject, error=error, names=names)


def _quantized(key: str, kind: str, what: str) -> Fault:
    """A base model that is quantized, and was not."""
    inject = _base(quantized=kind)
    return _fault(key, what, inject, QuantizationMismatchError, "quantization.layers")


FAULTS = (
    _fault("r01", "other base weights of the same shapes", _other_checkpoint),
    _fault("r02", "base in bf16, not fp32", _base(dtype=torch.bfloat16)),
    _quantized("r03", "nf4", "base in 4-bit NF4, not fp32"),
    _quantized("r04", "fp4", "base in 4-bit FP4, not fp32"),
    _quantized("r05", "int8", "base in 8-bit, not fp32"),
    Fault(
        key="r06",
        what="attention `eager`, not `sdpa`",
        inject=_base(attn_implementation="eager"),
    ),
    _fault("r07", "one base tensor changed by 1 %", _base(_perturbed), names=WEIGHT),
    _fault("r08", "one bit of one base tensor flipped", _base(_one_bit), names=WEIGHT),
    _fault("r09", "base in fp16, not fp32", _base(dtype=torch.float16)),
    Fault(key="r10", what="base in fp64, not fp32", inject=_base(_in_double)),
    _fault(
        "r11",
        "a base model of fewer layers",
        _checkpoint_with(num_hidden_layers=1),
        names="num_hidden_layers",
    ),
    _fault(
        "r12",
        "a base model of other widths",
        _checkpoint_with(hidden_size=128),
        names="hidden_size",
    ),
    _fault(
        "r13",
        "another `rms_norm_eps`, the same weights",
        _base(rms_norm_eps=1e-2),
        names="rms_norm_eps",
    ),
    _fault(
        "r14",
        "another `hidden_act`, the same weights",
        _base(hidden_act="gelu"),
        names="hidden_act",
    ),
    _fault("r15", "two layers swapped", _base(_swapped_layers)),
    _fault("r16", "another adapter merged into the base", _base(_merged), names="q_proj"),
    _fault("r17", "vocabulary resized", _base(_resized), names="lm_head.weight"),
    Fault(
        key="r18",
        what="another adapter on the base already",
        inject=_base(_wrapped),
        error=AdapterMismatchError,
        names="o_proj",
    ),
    Fault(
        key="r19",
        what="a hook that doubles a layer's output",
        inject=_base(_with_hook),
        error=PredictionMismatchError,
        names="predictions.",
    ),
    Fault(
        key="r20",
        what="base in train mode",
        inject=_base(lambda base: base.train()),
    ),
)
