"""Tensors in manifests: their dtype names, their digests, and those that the sidecar holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._codec import NOT_JSON
from peftstate._digest import pieces_digest
from peftstate._work import Work
from peftstate.sections._host_bytes import host_bytes, wait_until_written

if TYPE_CHECKING:
    import torch

SAMPLED_BYTES = 4096
"""Bytes that a sampled digest reads at each of its places."""
SAMPLED_PLACES = 16
"""Places that a sampled digest reads, evenly spread from the first byte to the last."""


@attrs.frozen(kw_only=True)
class TensorRecord:
    """A tensor as a manifest describes it.

    Attributes:
        dtype: Name of the dtype, such as ``"bfloat16"``.
        shape: The shape.
        digest: BLAKE3 over dtype, shape and bytes; `None` if the tensor could not be read where
            it was saved (on the meta device, offloaded, a shard of a distributed tensor).
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str | None


@attrs.frozen(kw_only=True)
class SidecarTensor:
    """A tensor that lies in the sidecar.

    Attributes:
        tensor: Its name in the sidecar.
        dtype: Name of the dtype.
        shape: The shape.
        digest: BLAKE3 over dtype, shape and bytes.
        data: The `torch.Tensor` itself; `None` in a manifest that was read without its sidecar.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    data: Any = attrs.field(default=None, eq=False, repr=False, metadata={NOT_JSON: True})

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> SidecarTensor:
        """Describe a tensor, which must not change until it is written."""
        return cls(
            tensor=name,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            digest=digest(tensor),
            data=tensor,
        )

    def load(self) -> torch.Tensor:
        """The tensor.

        Raises:
            ValueError: The manifest was read without its sidecar.
        """
        if self.data is None:
            raise ValueError(f"the tensor {self.tensor!r} of the sidecar was not loaded")
        tensor: torch.Tensor = self.data
        return tensor


def sidecar_tensors(record: Any) -> Iterator[SidecarTensor]:
    """The tensors that a record, or anything in one, wants in the sidecar."""
    if isinstance(record, SidecarTensor):
        yield record
    elif isinstance(record, TensorRecord):  # the most frequent by far
        return
    elif attrs.has(type(record)):
        for field in attrs.fields(type(record)):
            yield from sidecar_tensors(getattr(record, field.name))
    elif isinstance(record, Mapping):
        for value in record.values():
            yield from sidecar_tensors(value)
    elif isinstance(record, tuple):
        for value in record:
            yield from sidecar_tensors(value)


def with_tensors(record: Any, found: Mapping[str, torch.Tensor]) -> Any:
    """The same record, its sidecar tensors filled in from what was read."""
    if isinstance(record, SidecarTensor):
        return attrs.evolve(record, data=found[record.tensor])
    if isinstance(record, TensorRecord):
        return record
    if attrs.has(type(record)):
        fields = {
            field.name: with_tensors(getattr(record, field.name), found)
            for field in attrs.fields(type(record))
        }
        return type(record)(**fields)
    if isinstance(record, Mapping):
        return {key: with_tensors(value, found) for key, value in record.items()}
    if isinstance(record, tuple):
        return tuple(with_tensors(value, found) for value in record)
    return record


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in a manifest: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@cache
def _dtypes() -> dict[str, torch.dtype]:
    """The dtypes of this torch by their names."""
    import torch

    return {
        dtype_name(value): value for value in vars(torch).values() if type(value) is torch.dtype
    }


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name in a manifest, from a closed table.

    Raises:
        ValueError: There is no such dtype.
    """
    import torch

    known = _dtypes()
    if name not in known:
        raise ValueError(f"there is no dtype {name!r} in torch {torch.__version__}")
    return known[name]


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can be read in this process, without asking another rank."""
    import torch

    with torch._C.DisableTorchFunctionSubclass():  # weights of bitsandbytes would run Python for it
        return not tensor.is_meta and not isinstance(tensor, _distributed())


@cache
def _distributed() -> type[torch.Tensor]:
    """The class of tensors of which each process holds a part."""
    from torch.distributed.tensor import DTensor

    return DTensor


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as one run of bytes."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor on the CPU, in memory where torch would have it.

    A product's last bits may depend on where its factors begin, and what safetensors reads begins
    anywhere. torch would wake all its threads for each of many small copies.
    """
    import torch

    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    raw_bytes(copy).numpy()[:] = raw_bytes(tensor).numpy()
    return copy


def digest(tensor: torch.Tensor, dtype: str | None = None, *, sampled: bool = False) -> str:
    """The digest of a live tensor.

    Args:
        tensor: The tensor, on any device, of any dtype and layout.
        dtype: Name of a dtype to cast it to first; a cast that loses values gives a digest that
            is not the saved one.
        sampled: Read `SAMPLED_PLACES` places only. Tells other weights, not one changed value.
    """
    if dtype is not None and dtype != dtype_name(tensor.dtype):
        tensor = tensor.detach().to(dtype_named(dtype))
    raw = raw_bytes(tensor)
    if sampled and raw.numel() > SAMPLED_BYTES * SAMPLED_PLACES:
        raw = _sample(raw)
    name, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    return pieces_digest(name, shape, host_bytes(raw))


def _sample(raw: torch.Tensor) -> torch.Tensor:
    """Some places of a long run of bytes."""
    import torch

    last = raw.numel() - SAMPLED_BYTES
    starts = [last * place // (SAMPLED_PLACES - 1) for place in range(SAMPLED_PLACES)]
    return torch.cat([raw[start : start + SAMPLED_BYTES] for start in starts])


def is_lossless(tensor: torch.Tensor, dtype: str) -> bool:
    """Whether a dtype holds all values of a tensor as they are."""
    import torch

    return torch.equal(tensor.to(dtype_named(dtype)).to(tensor.dtype), tensor)


def tensor_record(
    tensor: torch.Tensor, dtype: str | None = None, *, sampled: bool = False, read: bool = True
) -> TensorRecord:
    """Describe a live tensor, cast to a dtype first if one is given.

    Args:
        tensor: The tensor.
        dtype: Name of a dtype to cast it to before it is digested.
        sampled: Whether to digest some places only.
        read: Whether to digest it at all.
    """
    readable = read and is_readable(tensor)
    return TensorRecord(
        dtype=dtype or dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        digest=digest(tensor, dtype, sampled=sampled) if readable else None,
    )


def tensor_records(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRecord]:
    """Describe many tensors, in the order of their names."""
    reading = Reading.begun(tensors)
    try:
        return reading.records()
    finally:
        reading.end()


@attrs.frozen
class Reading:
    """Tensors that other threads have begun to describe, and that must not change until `end`."""

    _names: Sequence[str]
    _work: Work[torch.Tensor, TensorRecord]

    @classmethod
    def begun(cls, tensors: Mapping[str, torch.Tensor]) -> Reading:
        """Begin."""
        names = sorted(tensors)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        jobs = [tensors[name] for name in names]
        wait_until_written(jobs)
        return cls(names, Work.begun(jobs, tensor_record, nbytes=nbytes))

    def records(self) -> dict[str, TensorRecord]:
        """The records, in the order of their names, once all are there."""
        return dict(zip(self._names, self._work.results(), strict=True))

    def end(self) -> None:
        """Leave undone what was not begun, and wait for what was."""
        self._work.end()
