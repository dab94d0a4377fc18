"""Digests of bytes that were digested before, which need not be computed again.

BLAKE3 reads a tensor at a third of the speed of memory, XXH3 at that speed. What has the dtype, the
shape and the 128 bits of XXH3 of something that was digested has its digest, too: every byte is
read, wherever it is. Who makes a file cannot make it for the seed, which is another one in each
process.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest

from peftstate.sections._tensors import digest, dtype_name, raw_bytes

if TYPE_CHECKING:
    import torch

WORTH_IT = 64 * 1024
"""Bytes from which on the digest is remembered."""
_MOST = 2**17
"""Tensors that are remembered before all are forgotten."""

_SEED = secrets.randbits(64)

_met: set[tuple[int, int]] = set()
"""Where tensors were that were digested, and their bytes: what is there again is worth a look."""
_digests: dict[tuple[str, tuple[int, ...], bytes], str] = {}
"""dtype, shape and XXH3 → the digest."""


def forget() -> None:
    """Forget all of it."""
    _met.clear()
    _digests.clear()


def remembered_digest(tensor: torch.Tensor, dtype: str | None = None) -> str:
    """The digest of a tensor.

    Of a place in memory that is met for the first time nothing is remembered, for most models are
    loaded onto once; from the second time on its bytes are.

    Args:
        tensor: A tensor that can be read, on any device.
        dtype: As in `digest`.
    """
    own = dtype_name(tensor.dtype)
    if tensor.device.type != "cpu" or tensor.nbytes < WORTH_IT or dtype not in (None, own):
        return digest(tensor, dtype)
    place = (tensor.data_ptr(), tensor.nbytes)
    if place not in _met:
        _make_room()
        _met.add(place)
        return digest(tensor)
    tensor = tensor.detach().contiguous()  # one copy at most, that both read
    data = raw_bytes(tensor).numpy().data
    key = (own, tuple(tensor.shape), xxh3_128_digest(data, _SEED))
    if (found := _digests.get(key)) is not None:
        return found
    found = digest(tensor)
    if xxh3_128_digest(data, _SEED) == key[-1]:  # or somebody wrote to it meanwhile
        _digests[key] = found
    return found


def _make_room() -> None:
    """Forget everything when it has become too much."""
    if len(_met) >= _MOST or len(_digests) >= _MOST:
        forget()
