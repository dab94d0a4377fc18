"""The digests of tensors and files."""

from __future__ import annotations

import hashlib
import struct

import pytest
from blake3 import blake3

from peftstate._digest import file_digest, seal_digest, tensor_digest

DATA = struct.pack("<6f", *range(6))


def test_tensor_digest() -> None:
    """BLAKE3 over a line with dtype and shape, then the bytes: what every release must compute."""
    expected = blake3(b"float32[2, 3]\n" + DATA).hexdigest()
    assert tensor_digest("float32", (2, 3), DATA) == expected
    assert expected == "99617204585598977f41d973bf540a751ffeaa6fa0158ffc8e3335eeed5eec5d"


def test_tensor_digest_of_scalar_and_empty() -> None:
    """A scalar has no dimensions, an empty tensor no bytes."""
    assert tensor_digest("int64", (), b"\1" + bytes(7)) == (
        blake3(b"int64[]\n\1" + bytes(7)).hexdigest()
    )
    assert tensor_digest("bfloat16", [0, 4], b"") == blake3(b"bfloat16[0, 4]\n").hexdigest()


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("int32", (2, 3), DATA),
        ("float32", (3, 2), DATA),
        ("float32", (6,), DATA),
        ("float32", (2, 3, 1), DATA),
        ("float32", (2, 3), DATA[:-1] + b"\0"),
    ],
)
def test_tensor_digest_tells(dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    """Another dtype, shape or bit gives another digest."""
    assert tensor_digest(dtype, shape, data) != tensor_digest("float32", (2, 3), DATA)


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_buffers(buffer: type) -> None:
    """Whatever holds the bytes, the digest is the same."""
    assert tensor_digest("float32", (2, 3), buffer(DATA)) == tensor_digest("float32", [2, 3], DATA)
    assert file_digest(buffer(DATA)) == file_digest(DATA)


def test_seal_digest() -> None:
    """The seal is plain BLAKE3: this is the test vector of its specification for no input."""
    assert seal_digest(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert seal_digest(b"abc") == blake3(b"abc").hexdigest()


def test_file_digest() -> None:
    """Files have SHA-256, the oid of Git LFS: this is FIPS 180's example."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(b"abc") == expected == hashlib.sha256(b"abc").hexdigest()
