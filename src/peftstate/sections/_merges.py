"""How adapters came to be merged, and whether a load can merge them again to the same weights.

Merging rounds, so the weights depend on what they were before, on the order of the adapters and on
`safe_merge`. A load merges into the weights that the checkpoint gives. Whether a merge in memory
did so, too, can only be seen when it is made: the weights before it are gone afterwards.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._modules import layers_of_peft
from peftstate.sections import _origin
from peftstate.sections._base_tensors import BaseTensor, base_tensors
from peftstate.sections._tensors import TensorRecord, tensor_record
from peftstate.sections._view import ModelView

if TYPE_CHECKING:
    from torch import nn

_ATTRIBUTE = "_peftstate_merge"


@attrs.frozen
class Merge:
    """What was seen of a merge.

    Attributes:
        obstacle: Why a load may not get the same weights; `None` if it does.
        is_safe: Whether it was made with `safe_merge`, which rounds in another way.
        state: What it led to, and what was merged, in samples of each tensor.
    """

    obstacle: str | None
    is_safe: bool
    state: Mapping[str, TensorRecord | float]


def observe(model: nn.Module, merge: Callable[[], None], *, is_safe: bool) -> None:
    """Merge, and have the model carry whether that can be repeated.

    The whole of the weights is looked at the first time only: a trainer may merge at each step, to
    hand the weights to an inference engine, and unmerge.

    Args:
        model: A PEFT model.
        merge: What merges.
        is_safe: Whether it does so with `safe_merge`.
    """
    earlier: Merge | None = getattr(model, _ATTRIBUTE, None)
    was_merged = bool(merged_layers(model))
    obstacle, changed = _obstacle_before(model, earlier, was_merged=was_merged, is_safe=is_safe)
    setattr(model, _ATTRIBUTE, Merge("merging was not finished", is_safe, {}))
    merge()
    if changed & _merged(base_tensors(ModelView.of(model))).keys():
        obstacle = "the weights that it was merged into were not those of the checkpoint any more"
    note(model, obstacle=obstacle, is_safe=is_safe)


def note(model: nn.Module, *, obstacle: str | None = None, is_safe: bool) -> None:
    """Have a model carry how it was merged just now."""
    state = _state(ModelView.of(model)) if obstacle is None else {}
    setattr(model, _ATTRIBUTE, Merge(obstacle, is_safe, state))


def _obstacle_before(
    model: nn.Module, earlier: Merge | None, *, was_merged: bool, is_safe: bool
) -> tuple[str | None, frozenset[str]]:
    """What is in the way of repeating a merge, before it is made.

    Returns:
        The reason that holds whatever is merged, and the names of the weights that must not be
        among those that are merged into.
    """
    if was_merged:
        reason = obstacle(ModelView.of(model))
        if reason is None and earlier is not None and earlier.is_safe != is_safe:
            reason = "it was merged in part with safe_merge, in part without"
        return reason, frozenset()
    if earlier is not None:
        return "it was merged and unmerged before, which rounds", frozenset()
    view = ModelView.of(model)
    adapted = {name: base for name, base in base_tensors(view).items() if base.owner.adapted}
    return None, _origin.changed(view, adapted)


def obstacle(view: ModelView) -> str | None:
    """Why a load may not get the merged weights by merging again; `None` if it does."""
    merge: Merge | None = getattr(view.model, _ATTRIBUTE, None)
    if merge is None:
        return (
            "how that was done is not known (before the model was attached, or not by its own "
            "merge_adapter())"
        )
    if merge.obstacle is None and _state(ModelView.of(view.model)) != merge.state:
        return "the merged weights or the adapter were changed afterwards"
    return merge.obstacle


def is_safe(model: nn.Module) -> bool:
    """Whether the adapters of a model were merged with `safe_merge`, as far as is known."""
    merge: Merge | None = getattr(model, _ATTRIBUTE, None)
    return merge is not None and merge.is_safe and bool(merged_layers(model))


def merged_layers(model: nn.Module) -> list[Sequence[str]]:
    """The adapters that are merged in each layer that has any, in the order it was done in."""
    return merged_in(layers_of_peft(model))


def merged_in(layers: Iterable[nn.Module]) -> list[Sequence[str]]:
    """The same of some layers of PEFT."""
    merged = (getattr(layer, "merged_adapters", ()) for layer in layers)
    return [tuple(names) for names in merged if names]


def order_of(layers: Sequence[Sequence[str]], preferred: Sequence[str] = ()) -> tuple[str, ...]:
    """An order in which adapters can be merged so that each layer gets them in its own order.

    Args:
        layers: The order of each layer.
        preferred: An order that is taken if it will do.
    """
    names = {name for layer in layers for name in layer}
    if set(preferred) == names and all(_is_in_order(layer, preferred) for layer in layers):
        return tuple(preferred)
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for layer in layers:
        for name in layer:
            sorter.add(name)
        for before, after in pairwise(layer):
            sorter.add(after, before)
    try:
        return tuple(sorter.static_order())
    except graphlib.CycleError:  # layers that were merged one by one; the weights will tell
        return tuple(sorted(names))


def _is_in_order(layer: Sequence[str], order: Sequence[str]) -> bool:
    """Whether the names of a layer come in an order."""
    return [name for name in order if name in layer] == list(layer)


def _merged(found: Mapping[str, BaseTensor]) -> dict[str, BaseTensor]:
    """The tensors of the base model that adapters are merged into."""
    return {name: base for name, base in found.items() if base.owner.merged}


def _state(view: ModelView) -> dict[str, TensorRecord | float]:
    """Samples of the merged weights, and of the adapters that are merged, with their factors."""
    merged = {name for layer in merged_layers(view.model) for name in layer}
    state: dict[str, TensorRecord | float] = {
        f"base.{name}": tensor_record(base.tensor, sampled=True)
        for name, base in _merged(base_tensors(view)).items()
    }
    for site in view.tensors():
        if site.adapter in merged:
            state[f"{site.adapter}.{site.name}"] = tensor_record(site.tensor, sampled=True)
    for found in view.sites():
        scaling: Any = getattr(found.module, "scaling", None)
        if found.adapter in merged and isinstance(scaling, dict) and found.adapter in scaling:
            state[f"scaling.{found.adapter}.{found.name}"] = float(scaling[found.adapter])
    return state
