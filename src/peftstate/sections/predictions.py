"""`predictions`: what the model said to chosen inputs, the check of all that no record names.

The saved model is run on the inputs, in eval mode and without autocast, and so is the reloaded one.
In the same environment the two must agree to the last bit. Elsewhere kernels round in another
order, and the largest difference may be

    (25 · eps(dtype) + 100 · eps(float32)) · the largest saved logit

where the dtype is the coarsest that the model computes in. A Gemma 3 of 270M parameters differs
between kernels of one processor by 2 to 18 eps in bfloat16, 4 in float16, and 26 in float32, in
which sums are formed; quantized in another way it differs by 36 of bfloat16 and more. What is less
than that is found by the other sections, which compare every tensor to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import attrs

from peftstate.errors import PredictionMismatchError
from peftstate.sections import _flags, _platform
from peftstate.sections._base import Section
from peftstate.sections._probe import device_kinds, predict
from peftstate.sections._tensors import SidecarTensor

if TYPE_CHECKING:
    import torch

    from peftstate.sections._view import ModelView

ROUNDINGS = 25
"""Units in the last place of the coarsest dtype that another environment may make."""
SUMS = 100
"""The same of float32, in which sums are formed."""
TF32 = 2.0**-10
"""The distance from 1 to the next number that has TF32's ten bits."""


@attrs.frozen(kw_only=True)
class PredictionsRecord:
    """What a model predicted.

    Attributes:
        inputs: The inputs, by the names of the arguments of `forward`.
        logits: The logits, or what stands first in the output of a model that has none.
        adapters: The adapters that were active.
        environment: BLAKE3 over what decides the last bits: versions, devices, settings.
        tolerance: The largest difference that is none in another environment.
        max_difference: The largest difference from the saved logits: 0.
        kl_divergence: The mean divergence of the distributions from the saved ones, in nats: 0.
        top1_agreement: The fraction of positions where the most likely is the saved one: 1.
    """

    inputs: Mapping[str, SidecarTensor]
    logits: SidecarTensor
    adapters: tuple[str, ...]
    environment: str
    tolerance: float
    max_difference: float
    kl_divergence: float
    top1_agreement: float

    def for_adapters(self, names: Collection[str]) -> PredictionsRecord | None:
        """The record, if it was made with these adapters only."""
        return self if set(self.adapters) <= set(names) else None


def inputs_of(record: PredictionsRecord | None) -> dict[str, torch.Tensor] | None:
    """The inputs that a record has, if there is one, to predict on them again."""
    if record is None:
        return None
    return {name: tensor.load() for name, tensor in record.inputs.items()}


def capture(view: ModelView) -> PredictionsRecord:
    """Run the model. It is left as it is."""
    inputs = view.probe or {}
    logits = predict(view.model, inputs)
    active = getattr(view.model, "active_adapters", ())
    return PredictionsRecord(
        inputs={
            name: SidecarTensor.of(f"predictions.inputs.{name}", tensor)
            for name, tensor in inputs.items()
        },
        logits=SidecarTensor.of("predictions.logits", logits),
        adapters=tuple(view.saved_name(live) or live for live in active),
        environment=_platform.key(device_kinds(view.model)),
        tolerance=_tolerance(view, logits),
        max_difference=0.0,
        kl_divergence=0.0,
        top1_agreement=1.0,
    )


def capture_like(view: ModelView, record: PredictionsRecord) -> PredictionsRecord:
    """Run the model on the saved inputs, and measure how far off it is."""
    saved, found = record.logits.load(), predict(view.model, inputs_of(record) or {})
    if found.dtype != saved.dtype or found.shape != saved.shape:
        return attrs.evolve(record, logits=SidecarTensor.of(record.logits.tensor, found))
    largest = difference(saved, found)
    allowed = 0.0
    if record.environment != _platform.key(device_kinds(view.model)):
        allowed = max(record.tolerance, _tolerance(view, saved))
    if largest <= allowed:
        return record
    return attrs.evolve(
        record,
        max_difference=largest,
        kl_divergence=divergence(saved, found),
        top1_agreement=agreement(saved, found),
    )


def difference(saved: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference; infinite where only one is infinite or not a number."""
    import torch

    same = torch.eq(saved, found) | (saved.isnan() & found.isnan())
    off = (saved.double() - found.double()).abs().masked_fill(same, 0.0)
    return float(off.nan_to_num(nan=math.inf, posinf=math.inf).max()) if off.numel() else 0.0


def divergence(saved: torch.Tensor, found: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence over the last dimension; infinite if it is no number."""
    import torch

    if not saved.dim():
        return 0.0
    before, now = (torch.log_softmax(logits.double(), dim=-1) for logits in (saved, found))
    terms = (before.exp() * (before - now)).masked_fill(before == -math.inf, 0.0)
    mean = float(terms.sum(-1).mean())
    return math.inf if math.isnan(mean) else max(mean, 0.0)


def agreement(saved: torch.Tensor, found: torch.Tensor) -> float:
    """The fraction of positions where the most likely is the same."""
    import torch

    same = torch.eq(saved.argmax(-1), found.argmax(-1)) if saved.dim() else torch.tensor([False])
    return float(same.double().mean())


def _tolerance(view: ModelView, logits: torch.Tensor) -> float:
    """The largest difference that another environment may make."""
    import torch

    single = torch.finfo(torch.float32).eps
    relative = ROUNDINGS * _eps(view, logits) + SUMS * single
    finite = logits[logits.isfinite()]
    return relative * float(finite.abs().max()) if finite.numel() else relative


def _eps(view: ModelView, logits: torch.Tensor) -> float:
    """The distance from 1 to the next number in the coarsest dtype that the model computes in."""
    import torch

    dtypes = {site.tensor.dtype for site in view.tensors()}
    quantized = (getattr(module, "compute_dtype", None) for module in view.model.modules())
    dtypes |= {dtype for dtype in quantized if dtype is not None}
    computed = {torch.float64, torch.float32, torch.float16, torch.bfloat16} & dtypes
    eps = max(torch.finfo(dtype).eps for dtype in {*computed, logits.dtype})
    backends = {"cuda": ("cuda", "cudnn"), "cpu": ("mkldnn",)}
    used = {name for kind in device_kinds(view.model) for name in backends.get(kind, ())}
    rounding = {
        value
        for name, value in _flags.read().items()
        if name.endswith("fp32_precision") and name.partition(".")[0] in used
    }
    rounded = {"tf32": TF32, "bf16": torch.finfo(torch.bfloat16).eps}
    return max([eps, *(rounded[value] for value in rounding if value in rounded)])


SECTION = Section(
    name="predictions",
    record=PredictionsRecord,
    capture=capture,
    capture_like=capture_like,
    per_adapter=True,
    is_captured=lambda view: view.probe is not None,
    error=PredictionMismatchError,
)
