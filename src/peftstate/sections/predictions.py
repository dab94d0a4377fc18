"""`predictions`: what the model said to chosen inputs, the check of all that no record names.

The saved model is run on the inputs, in eval mode and without autocast, and so is the reloaded one.
In the same environment the two must agree to the last bit. Elsewhere kernels round in another
order, and the largest difference may be

    (10 · eps(dtype) + 100 · eps(float32)) · the largest saved logit

where the dtype is the coarsest that the model computes in. A Gemma 3 of 270M parameters differs
between kernels of one processor by 6 eps in bfloat16, 4 eps in float16, and 26 eps in float32, in
which sums are formed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from peftstate.errors import PredictionMismatchError
from peftstate.sections import _flags, _generators, _platform
from peftstate.sections._base import Section
from peftstate.sections._tensors import SidecarTensor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftstate.sections._view import ModelView

ROUNDINGS = 10
"""Units in the last place of the coarsest dtype that another environment may make."""
SUMS = 100
"""The same of float32, in which sums are formed."""
TF32 = 2.0**-10
"""The distance from 1 to the next number that has TF32's ten bits."""
LENGTH = 16
"""Tokens in the synthetic inputs."""


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


def probe_inputs(probe: Any, base: nn.Module) -> dict[str, torch.Tensor] | None:
    """The inputs to predict on, as copies on the CPU, whatever form they come in.

    Args:
        probe: A mapping, a tensor, ``True`` for synthetic inputs, or `None` or ``False`` for none.
        base: The base model.

    Raises:
        TypeError: It is something else, or not all its values are tensors.
        ValueError: No inputs can be made up for this model.
    """
    import torch

    if probe is None or probe is False:
        return None
    main = getattr(base, "main_input_name", "input_ids")
    if probe is True:
        probe = _synthetic(base, main)
    elif isinstance(probe, torch.Tensor):
        probe = {main: probe}
    if not isinstance(probe, Mapping):
        raise TypeError(
            "prediction_probe must be a mapping of tensors by the arguments of forward, a tensor "
            f"of {main}, or True; it is a {type(probe).__name__}"
        )
    for name, value in probe.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"prediction_probe[{name!r}] is a {type(value).__name__}, and must be a tensor; "
                'of a tokenizer, ask for return_tensors="pt"'
            )
    return {name: _copy(value) for name, value in probe.items()}


def _synthetic(base: Any, main: str) -> dict[str, torch.Tensor]:
    """Some ids, the same for each model of this vocabulary, no special ones among them."""
    import torch

    config = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if main != "input_ids" or not isinstance(size, int):
        raise ValueError(
            f"prediction_probe=True: no inputs can be made up for a {type(base).__name__}, which "
            f"takes {main}; pass the inputs themselves"
        )
    ids_of = (vars(owner).items() for owner in (config, text))
    special = {value for items in ids_of for name, value in items if "token" in name and _is_id(value)}
    ids = [id_ for id_ in range(size) if id_ not in special] or [0]
    chosen = [ids[number * len(ids) // LENGTH] for number in range(LENGTH)]
    inputs = {"input_ids": torch.tensor([chosen])}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.tensor([chosen[: LENGTH // 4]])
    return inputs


def _is_id(value: object) -> bool:
    """Whether a value of a config may be an id of a token."""
    return type(value) is int


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, in memory of its own."""
    import torch

    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def inputs_of(record: PredictionsRecord | None) -> dict[str, torch.Tensor] | None:
    """The inputs that a record has, to predict on them again."""
    return record and {name: tensor.load() for name, tensor in record.inputs.items()}


def capture(view: ModelView) -> PredictionsRecord:
    """Run the model. It is left as it is."""
    assert view.probe is not None
    logits = predict(view.model, view.probe)
    active = getattr(view.model, "active_adapters", ())
    return PredictionsRecord(
        inputs={
            name: SidecarTensor.of(f"predictions.inputs.{name}", tensor)
            for name, tensor in view.probe.items()
        },
        logits=SidecarTensor.of("predictions.logits", logits),
        adapters=tuple(view.saved_name(live) or live for live in active),
        environment=_platform.key(_kinds(view.model)),
        tolerance=_tolerance(view, logits),
        max_difference=0.0,
        kl_divergence=0.0,
        top1_agreement=1.0,
    )


def capture_like(view: ModelView, record: PredictionsRecord) -> PredictionsRecord:
    """Run the model on the saved inputs, and measure how far off it is."""
    import torch

    inputs, saved = inputs_of(record), record.logits.load()
    assert inputs is not None
    found = predict(view.model, inputs)
    if found.dtype != saved.dtype or found.shape != saved.shape:
        return attrs.evolve(record, logits=SidecarTensor.of(record.logits.tensor, found))
    difference = _difference(saved, found)
    allowed = 0.0
    if record.environment != _platform.key(_kinds(view.model)):
        allowed = max(record.tolerance, _tolerance(view, saved))
    if difference <= allowed:
        return record
    same = torch.eq(saved.argmax(-1), found.argmax(-1)) if saved.dim() else torch.tensor([False])
    return attrs.evolve(
        record,
        max_difference=difference,
        kl_divergence=_divergence(saved, found),
        top1_agreement=float(same.double().mean()),
    )


def _difference(saved: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference; infinite where only one is infinite or not a number."""
    import torch

    same = torch.eq(saved, found) | (saved.isnan() & found.isnan())
    off = (saved.double() - found.double()).abs().masked_fill(same, 0.0)
    return float(off.nan_to_num(nan=math.inf, posinf=math.inf).max()) if off.numel() else 0.0


def _divergence(saved: torch.Tensor, found: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence over the last dimension; infinite if that is no number."""
    import torch

    if not saved.dim():
        return 0.0
    before, now = (torch.log_softmax(logits.double(), dim=-1) for logits in (saved, found))
    terms = (before.exp() * (before - now)).masked_fill(before == -math.inf, 0.0)
    mean = float(terms.sum(-1).mean())
    return math.inf if math.isnan(mean) else max(mean, 0.0)


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
    dtypes |= {getattr(module, "compute_dtype", None) for module in view.model.modules()}
    computed = {torch.float64, torch.float32, torch.float16, torch.bfloat16} & {*dtypes, logits.dtype}
    eps = max(torch.finfo(dtype).eps for dtype in computed)
    backends = {"cuda": ("cuda", "cudnn"), "cpu": ("mkldnn",)}
    used = {name for kind in _kinds(view.model) for name in backends.get(kind, ())}
    rounding = {
        value
        for name, value in _flags.read().items()
        if name.endswith("fp32_precision") and name.partition(".")[0] in used
    }
    rounded = {"tf32": TF32, "bf16": torch.finfo(torch.bfloat16).eps}
    return max([eps, *(rounded[value] for value in rounding if value in rounded)])


def _kinds(model: nn.Module) -> set[str]:
    """The kinds of device that a model is on."""
    return {parameter.device.type for parameter in model.parameters()} - {"meta"}


def predict(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run a model in eval mode and leave it, and all generators, as they were.

    `forward` is that of the class: what accelerate wraps around it on the model itself is taken
    for what it is, a part of the trainer.

    Returns:
        The logits, on the CPU.
    """
    import torch

    devices = (tensor.device for tensor in model.parameters() if not tensor.is_meta)
    device = next(devices, torch.device("cpu"))
    with _left_alone(model), torch.no_grad():
        model.eval()
        output = type(model).forward(
            model, **{name: tensor.to(device) for name, tensor in inputs.items()}
        )
        return _copy(_logits(output))


@contextmanager
def _left_alone(model: Any) -> Iterator[None]:
    """Have the same numerics in the body wherever it runs, and put everything back."""
    import torch

    from peftstate._snapshot import Snapshot

    snapshot = Snapshot.of(model)
    with ExitStack() as stack:
        stack.callback(snapshot.restore)
        stack.enter_context(_generators.kept(seed=0))
        stack.enter_context(
            _flags.set_to({"cudnn.benchmark": False, "cudnn.deterministic": True})
        )
        for kind in _kinds(model):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _logits(output: Any) -> torch.Tensor:
    """The logits in an output, or the hidden states, or its first tensor of floating numbers.

    Raises:
        ValueError: There is none.
    """
    import torch

    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor):
            return found
    todo = [output]
    while todo:
        item = todo.pop(0)
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            return item
        if isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
    raise ValueError(f"prediction_probe: a {type(output).__name__} holds no floating point tensor")


SECTION = Section(
    name="predictions",
    record=PredictionsRecord,
    capture=capture,
    capture_like=capture_like,
    per_adapter=True,
    is_captured=lambda view: view.probe is not None,
    error=PredictionMismatchError,
)
