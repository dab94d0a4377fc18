"""What differs between a saved model and its reload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

Observation = Mapping[str, Any]
"""What is compared, by name: what a model computes, as tensors, and state, as other values."""
_LONGEST = 28
"""Characters of a value that a table shows."""
_SHOWN = 2
"""Differences that it shows."""


@attrs.frozen
class Difference:
    """What differs.

    Attributes:
        text: In words for a table.
        is_computed: Whether the model computes something else, and not only its state differs.
    """

    text: str
    is_computed: bool

    def __str__(self) -> str:
        return self.text


def difference(saved: Observation, found: Observation) -> Difference | None:
    """Say what differs, what is computed first; `None` if nothing does."""
    names = [*saved, *(name for name in found if name not in saved)]
    differing = [name for name in names if not _equal(saved.get(name), found.get(name))]
    if not differing:
        return None
    computed = {name for name in differing if isinstance(saved.get(name), torch.Tensor)}
    differing.sort(key=lambda name: name not in computed)
    shown = [_words(name, saved.get(name), found.get(name)) for name in differing[:_SHOWN]]
    more = len(differing) - len(shown)
    text = ", ".join([*shown, f"and {more} more"] if more else shown)
    return Difference(text, bool(computed))


def _equal(saved: Any, found: Any) -> bool:
    """Whether two values are the same, to the last bit."""
    if isinstance(saved, torch.Tensor) and isinstance(found, torch.Tensor):
        return saved.dtype == found.dtype and torch.equal(saved, found)
    return type(saved) is type(found) and bool(saved == found)


def _words(name: str, saved: Any, found: Any) -> str:
    """How two values differ."""
    if isinstance(saved, tuple) and isinstance(found, tuple):
        return f"{name}: {len(saved)} → {len(found)}"
    if not isinstance(saved, torch.Tensor) or not isinstance(found, torch.Tensor):
        return f"{name}: {_short(saved)} → {_short(found)}"
    if saved.shape != found.shape:
        return f"{name} of shape {tuple(saved.shape)} → {tuple(found.shape)}"
    if not saved.is_floating_point():
        return f"other {name}"
    largest = (saved.double() - found.double()).abs().max().item()
    if largest == 0:
        return f"{name} in {_short(saved.dtype)} → {_short(found.dtype)}"
    return f"max |Δ {name}| {largest:.2g}"


def _short(value: Any) -> str:
    """A value as a table shows it."""
    text = str(value).removeprefix("torch.") or "none"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
