"""Cheap evidence that the tensors of a live model are still those that were digested.

A server that loads its hundredth adapter into one live model need not read the base model a
hundredth time. A tensor that was read to the last byte, and is the same object since then, in the
same memory, of the same version (torch counts what writes to a tensor, but not what writes to
``.data`` or from a kernel of its own, as fused optimizers do) and with the same bytes in `PLACE` of
every `STRIDE`, is taken to be unchanged, if that holds of all tensors that were read. What that
does not see is a write past torch to less than `STRIDE` bytes in one piece, if it leaves alone
every place of every tensor. Trainable tensors are read each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import attrs
from xxhash import xxh3_128

from peftstate.sections import _bitsandbytes
from peftstate.sections._tensors import is_readable

if TYPE_CHECKING:
    import torch

    from peftstate.sections._base_tensors import BaseTensor
    from peftstate.sections._tensors import TensorRecord
    from peftstate.sections._walk import TensorSite

STRIDE = 64 * 1024
"""Bytes of a tensor of which `PLACE` bytes are looked at; of a shorter one, all."""
PLACE = 64
"""Bytes; what a CPU reads from memory at once."""


@attrs.frozen
class _Look:
    """What some tensors look like: where they are, versions, forms, and some of their bytes."""

    pointers: tuple[int, ...]
    versions: tuple[int, ...]
    forms: tuple[tuple[torch.dtype, torch.Size], ...]
    places: bytes

    @classmethod
    def of(cls, owner: TensorSite) -> _Look:
        """Look at a contiguous tensor, and at what it makes up a quantized weight with."""
        parts = [owner.tensor, *_bitsandbytes.scales_of(owner.module, owner.tensor)]
        tensors = [part.detach() for part in parts]  # is of the same version, but no subclass
        hasher = xxh3_128()
        for tensor in tensors:
            hasher.update(_places(tensor).cpu().numpy().data)
        return cls(
            tuple([tensor.data_ptr() for tensor in tensors]),
            # scales may be of inference mode, where there is no version
            tuple([-1 if each.is_inference() else each._version for each in tensors]),
            tuple([(each.dtype, each.shape) for each in tensors]),
            hasher.digest(),
        )


def _places(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor that are looked at."""
    import torch

    raw = tensor.reshape(-1).view(torch.uint8)
    if raw.numel() <= STRIDE:
        return raw
    number = (raw.numel() - PLACE) // STRIDE + 1
    places = raw.as_strided((number, PLACE), (STRIDE, 1))
    return torch.cat([places.reshape(-1), raw[-PLACE:]])


@attrs.define
class _Seen:
    """A tensor that was digested: how it looked just before, and what it gave.

    Attributes:
        look: Of it, and of the other tensors that its layer's quantized weight is made of.
        digests: The digests: name and dtype → digest.
    """

    look: _Look
    digests: dict[tuple[str, str], str] = attrs.field(factory=dict)


_LOCK = Lock()


@cache
def _tensors() -> Any:
    """The tensors of live models that were digested, each forgotten when it is no more."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


@attrs.frozen
class Looks:
    """What the tensors of a base model look like at one moment, before they are read.

    Those that a look does not tell enough of are not among them.
    """

    _bases: Mapping[str, BaseTensor]
    _looks: Mapping[int, _Look]

    @classmethod
    def of(cls, bases: Mapping[str, BaseTensor]) -> Looks:
        """Look at the tensors of a base model."""
        import torch

        fixed = {name: base for name, base in bases.items() if not base.replayed}
        owners = {id(base.owner.tensor): base.owner for base in fixed.values()}
        with torch._C.DisableTorchFunctionSubclass():  # as in `is_readable`
            looks = {key: _Look.of(owner) for key, owner in owners.items() if _tells(owner.tensor)}
        told = {name: base for name, base in fixed.items() if id(base.owner.tensor) in looks}
        return cls(told, looks)

    def unchanged(self, saved: Mapping[str, TensorRecord]) -> frozenset[str]:
        """The names of the tensors that are known to be as they were saved.

        None is, if any that was read looks different: what has changed one may have changed others.
        """
        found = set()
        for name, base in self._bases.items():
            with _LOCK:
                seen: _Seen | None = _tensors().get(base.owner.tensor)
            if seen is None or base.owner.tensor.requires_grad:
                continue
            if seen.look != self._looks[id(base.owner.tensor)]:
                return frozenset()
            record = saved.get(name)
            if record is None or record.digest is None:
                continue
            if seen.digests.get((name, record.dtype)) == record.digest:
                found.add(name)
        return frozenset(found)

    def note(self, records: Iterable[tuple[str, TensorRecord]]) -> None:
        """Note the digests that tensors gave after they were looked at."""
        noted: dict[int, _Seen] = {}
        for name, record in records:
            base = self._bases.get(name)
            if base is None or record.digest is None:
                continue
            tensor = base.owner.tensor
            with _LOCK:
                if id(tensor) not in noted:
                    noted[id(tensor)] = self._seen_as_now(tensor)
                noted[id(tensor)].digests[name, record.dtype] = record.digest

    def _seen_as_now(self, tensor: torch.Tensor) -> _Seen:
        """What is noted of a tensor, begun anew if it looks different; `_LOCK` is held."""
        seen: _Seen | None = _tensors().get(tensor)
        look = self._looks[id(tensor)]
        if seen is None or seen.look != look:
            _tensors()[tensor] = seen = _Seen(look)
        return seen


def _tells(tensor: torch.Tensor) -> bool:
    """Whether a look at a tensor tells of it: it is there, in one piece, and has a version."""
    import torch

    if hasattr(tensor, "__tensor_flatten__") or tensor.layout is not torch.strided:
        return False
    if tensor.is_inference() or not is_readable(tensor):
        return False
    return tensor.is_contiguous() and tensor.numel() > 0
