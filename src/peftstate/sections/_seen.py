"""A cheap proof that a tensor of a live model is still the one that was digested.

A server that loads its hundredth adapter onto one base model need not read the base model a
hundredth time. A tensor that was read to the last byte, and is the same object since then, with the
same memory, the same version (torch counts what writes to a tensor, but not what writes to
``.data`` or from a kernel of its own, as optimizers do) and the same bytes in some places, is taken
to be unchanged. What that does not see is a write past torch that leaves all of these places alone.
Trainable tensors are read each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import attrs
from blake3 import blake3

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

    from peftstate.sections._base_tensors import BaseTensor

PLACES = 4
"""Places of a tensor that are read, evenly spread from the first byte to the last."""
BYTES = 512
"""Bytes that are read at each of them."""


@attrs.frozen
class _Seen:
    """A tensor when it was digested, and the digests that it gave: name, dtype → digest."""

    pointer: int
    version: int
    places: bytes
    digests: dict[tuple[str, str], str] = attrs.field(factory=dict, eq=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Seen:
        """Look at a tensor."""
        hasher = blake3()
        for place in _places(tensor):
            hasher.update(place)
        return cls(tensor.data_ptr(), tensor._version, hasher.digest())


def _places(tensor: torch.Tensor) -> Iterator[Buffer]:
    """Some bytes of a contiguous tensor."""
    import torch

    raw = tensor.detach().reshape(-1).view(torch.uint8)
    last = max(raw.numel() - BYTES, 0)
    starts = [last * place // (PLACES - 1) for place in range(PLACES)]
    if raw.device.type == "cpu":
        data = raw.numpy().data
        yield from (data[start : start + BYTES] for start in starts)
    else:
        yield torch.cat([raw[start : start + BYTES] for start in starts]).cpu().numpy().data


_LOCK = Lock()


@cache
def _tensors() -> Any:
    """The tensors of live models that were digested, each forgotten when it is no more."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def digest_of(name: str, base: BaseTensor, dtype: str) -> str | None:
    """The digest that a tensor gave, if it is still the same."""
    tensor = base.owner.tensor
    with _LOCK:
        seen: _Seen | None = _tensors().get(tensor)
    digest = None if seen is None else seen.digests.get((name, dtype))
    if digest is None or tensor.requires_grad or not _can_tell(base) or _Seen.of(tensor) != seen:
        return None
    return digest


def note(name: str, base: BaseTensor, dtype: str, digest: str) -> None:
    """Note the digest that a tensor gave just now."""
    if _can_tell(base):
        found = _Seen.of(base.owner.tensor)
        with _LOCK:
            seen: _Seen | None = _tensors().get(base.owner.tensor)
            if seen is None or seen != found:
                _tensors()[base.owner.tensor] = seen = found
            seen.digests[name, dtype] = digest


def _can_tell(base: BaseTensor) -> bool:
    """Whether a tensor lies in one piece in memory, and nothing is merged into it."""
    tensor = base.owner.tensor
    is_plain = base.is_readable and tensor.is_contiguous() and tensor.numel() > 0
    return is_plain and not base.replayed
