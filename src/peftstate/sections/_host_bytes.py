"""The bytes of a tensor, on the host, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

CHUNK = 32 * 1024 * 1024
"""Bytes that are copied from a CUDA device at a time; two such pieces of host memory are pinned."""


def host_bytes(raw: torch.Tensor) -> Iterator[Buffer]:
    """The bytes of a tensor.

    Args:
        raw: A run of bytes, on any device. From a CUDA device a piece is copied while the one
            before it is looked at, which is overwritten when the one after the next is asked for.
    """
    if raw.device.type == "cuda" and raw.numel() > 0:
        yield from _from_cuda(raw)
    else:
        yield raw.cpu().numpy().data


def wait_until_written(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until what this thread writes to tensors is there, for other threads to read them.

    On CUDA each thread has a current stream of its own, which knows nothing of the others'.
    """
    import torch

    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _from_cuda(raw: torch.Tensor) -> Iterator[Buffer]:
    """The pieces of a run of bytes on a CUDA device, by way of pinned memory."""
    import torch

    pieces = raw.split(CHUNK)  # type: ignore[no-untyped-call]
    sizes = [piece.numel() for piece in pieces[:2]]
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
    stream = torch.cuda.Stream(raw.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(raw.device))  # which may be writing the tensor

    def copy(index: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Begin to copy a piece."""
        target = buffers[index % 2][: pieces[index].numel()]
        with torch.cuda.stream(stream):
            target.copy_(pieces[index], non_blocking=True)
            return target, stream.record_event()

    copying = [copy(0)]
    for index in range(1, len(pieces) + 1):
        if index < len(pieces):
            copying.append(copy(index))
        target, event = copying.pop(0)
        event.synchronize()
        yield target.numpy().data
