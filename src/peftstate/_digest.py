"""Digests: BLAKE3 for tensors, SHA-256 for files.

BLAKE3 reads a tensor at the speed of memory and is used where we alone compare. SHA-256 is what
Git LFS, the Hub and sigstore state for a file, so that a manifest can be held against them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from blake3 import blake3
from typing_extensions import Buffer

_AT_ONCE = 32 * 1024 * 1024
"""Bytes of a file that are hashed before anybody is told; SHA-256 takes 15 ms for them."""


def tensor_digest(dtype: str, shape: Sequence[int], data: Buffer) -> str:
    """The digest of a tensor: of its dtype, its shape and its bytes.

    Args:
        dtype: Name of the dtype as torch writes it, such as ``"bfloat16"``.
        shape: The shape.
        data: The elements, contiguous, in row-major order and little-endian, as safetensors
            stores them.

    Returns:
        64 lower-case hexadecimal digits.
    """
    return pieces_digest(dtype, shape, (data,))


def pieces_digest(dtype: str, shape: Sequence[int], pieces: Iterable[Buffer]) -> str:
    """The digest of a tensor whose bytes come in pieces, each looked at before the next is made."""
    hasher = blake3(f"{dtype}{list(shape)}\n".encode())
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest()


def seal_digest(data: bytes) -> str:
    """The digest that seals a manifest, over its canonical form without the seal."""
    return blake3(data).hexdigest()


def json_digest(value: Any) -> str:
    """The digest of a JSON value, which need not be one that a manifest could hold."""
    return blake3(json.dumps(value, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def file_digest(data: Buffer, reach: Callable[[int], object] = lambda _: None) -> str:
    """The SHA-256 of a file's content.

    Args:
        data: The content.
        reach: Told now and then how many bytes were read.
    """
    hasher = hashlib.sha256()
    content = memoryview(data).cast("B")
    for start in range(0, len(content), _AT_ONCE):
        hasher.update(content[start : start + _AT_ONCE])
        reach(min(start + _AT_ONCE, len(content)))
    return hasher.hexdigest()
