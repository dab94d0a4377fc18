"""Two models that should be the same: the exact reload, and the one that its user has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, TypeVar

import attrs
import torch

from peftstate.manifest import Manifest
from peftstate.sections._bitsandbytes import kind_of
from peftstate.sections._view import ModelView
from peftstate.sections._walk import TensorSite

T = TypeVar("T")
Key: TypeAlias = tuple[str, str | None, str]
"""What a tensor is found by in both models: its part, its adapter, its name."""


@attrs.frozen(kw_only=True)
class Pair:
    """The two models. Their adapters have the same live names.

    Attributes:
        exact: What peftstate reloaded, and verified. Only within `predict` is it changed.
        users: What its user has.
        manifest: What was saved.
        theirs: The user's tensors as they are, but quantized weights. Layers of the user's model
            may be lent to the exact reload, and changed there.
    """

    exact: ModelView
    users: ModelView
    manifest: Manifest
    theirs: Mapping[Key, torch.Tensor]

    @classmethod
    def of(cls, exact: ModelView, users: ModelView, manifest: Manifest) -> Pair:
        """Put two models together."""
        theirs = {name: site.tensor.detach() for name, site in plain_tensors(users).items()}
        return cls(exact=exact, users=users, manifest=manifest, theirs=theirs)


@attrs.frozen(kw_only=True)
class Difference:
    """One thing in which the two models differ.

    Attributes:
        name: What it is, for a person.
        section: The section that records it.
        saved: What the exact reload has, in a few words.
        found: What the user's model has.
        remedy: What the user can do about it.
        give: Gives the exact reload what the user's model has, and nothing else.
    """

    name: str
    section: str
    saved: str
    found: str
    remedy: str
    give: Callable[[], None]


def key(site: TensorSite) -> Key:
    """What a tensor is found by in the other model."""
    return (site.part, site.adapter, site.name)


def plain_tensors(view: ModelView) -> dict[Key, TensorSite]:
    """The floating-point tensors of a model; quantized weights are not among them."""
    return {
        key(site): site
        for site in view.tensors()
        if site.tensor.is_floating_point() and not (site.leaf == "weight" and kind_of(site.module))
    }


def put(site: TensorSite, tensor: torch.Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Put a tensor of the other model in a place of this one, without writing into either."""
    site.replace(tensor.detach().to(site.tensor.device, dtype or tensor.dtype))


def alike(saved: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two tensors are the same but for what their dtypes lose."""
    if saved.shape != found.shape:
        return False
    found = found.detach().to(saved.device)
    wide = torch.promote_types(saved.dtype, found.dtype)
    if wide in (saved.dtype, found.dtype):  # the other one was rounded, or is the same
        narrow = found.dtype if wide == saved.dtype else saved.dtype
        return torch.equal(saved.to(narrow), found.to(narrow))
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (saved, found))
    return torch.allclose(saved.to(wide), found.to(wide), rtol=eps, atol=eps * eps, equal_nan=True)


def usual(values: Iterable[T]) -> T:
    """The most frequent of some values."""
    return Counter(values).most_common(1)[0][0]


def counted(names: Iterable[str]) -> str:
    """How many tensors or layers there are, and one of them."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first
