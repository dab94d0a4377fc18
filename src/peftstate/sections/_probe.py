"""Running a model on chosen inputs, with no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from peftstate.sections import _flags, _generators

if TYPE_CHECKING:
    import torch
    from torch import nn

LENGTH = 16
"""Tokens in the synthetic inputs."""


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

    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if main != "input_ids" or not isinstance(size, int):
        raise ValueError(
            f"prediction_probe=True: no inputs can be made up for a {type(base).__name__}, which "
            f"takes {main}; pass the inputs themselves"
        )
    fields = [*vars(config).items(), *vars(text).items()]
    special = {value for name, value in fields if "token" in name and type(value) is int}
    ids = [id_ for id_ in range(size) if id_ not in special] or [0]
    chosen = [ids[number * len(ids) // LENGTH] for number in range(LENGTH)]
    inputs = {"input_ids": torch.tensor([chosen])}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.tensor([chosen[: LENGTH // 4]])
    return inputs


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, in memory of its own."""
    import torch

    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def device_kinds(model: nn.Module) -> set[str]:
    """The kinds of device that a model is on."""
    return {parameter.device.type for parameter in model.parameters()} - {"meta"}


def predict(
    model: Any, inputs: Mapping[str, torch.Tensor], change: Callable[[Any], object] | None = None
) -> torch.Tensor:
    """Run a model in eval mode and leave it, and all generators, as they were.

    `forward` is that of the class: what accelerate wraps around it on the model itself is taken
    for what it is, a part of the trainer.

    Args:
        model: The model.
        inputs: What its `forward` takes.
        change: What is done to it after it was put in eval mode, and undone after it ran, as far
            as nothing is written into a tensor.

    Returns:
        The logits, on the CPU.
    """
    import torch

    devices = (tensor.device for tensor in model.parameters() if not tensor.is_meta)
    device = next(devices, torch.device("cpu"))
    with _left_alone(model), torch.no_grad():
        model.eval()
        if change is not None:
            change(model)
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
        stack.enter_context(_flags.set_to({"cudnn.benchmark": False, "cudnn.deterministic": True}))
        for kind in device_kinds(model):
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
        if isinstance(item, (Mapping, list, tuple)):
            todo = [*(item.values() if isinstance(item, Mapping) else item), *todo]
    raise ValueError(f"prediction_probe: a {type(output).__name__} holds no floating point tensor")
