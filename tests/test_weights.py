"""Parsing weights that somebody else may have written."""

from __future__ import annotations

import gc
import io
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from peftstate._disk import BOUNDARY, read_file
from peftstate._weights import parse_weights
from peftstate.errors import IntegrityError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def pickled(value: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def headed(header: Any, data: bytes = b"") -> bytes:
    """A file as safetensors writes it, with any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("name", "data"),
    [("w.safetensors", safetensors.torch.save(TENSORS)), ("w.bin", pickled(TENSORS))],
)
def test_both_formats(name: str, data: bytes) -> None:
    """Weights come from either format as they were."""
    found = parse_weights(name, data)
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert found[key].dtype is tensor.dtype
        assert torch.equal(found[key], tensor)


def read(folder: Path, tensors: dict[str, torch.Tensor]) -> memoryview:
    """The content of a file with tensors, as a load reads it."""
    safetensors.torch.save_file(tensors, folder / "w.safetensors")
    return read_file(folder / "w.safetensors", inside=[folder])


def place(data: memoryview) -> tuple[int, int]:
    """Where some memory begins and ends."""
    start = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    return start, start + len(data)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="such memory is Linux's")
def test_tensors_stay_where_they_were_read(tmp_path: Path) -> None:
    """Those of a large file are not copied, begin where torch would have them, and are separate."""
    saved = {"a": torch.rand(256, 128), "b": torch.rand(64, 64).to(torch.bfloat16)}
    data = read(tmp_path, saved)
    begin, end = place(data)
    found = parse_weights("w.safetensors", data)
    for name, tensor in found.items():
        assert torch.equal(tensor, saved[name])
        assert begin <= tensor.data_ptr() < end
        assert tensor.data_ptr() % BOUNDARY == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    found["a"].zero_()
    assert torch.equal(found["b"], saved["b"])
    again = safetensors.torch.save(found)
    del data, found
    gc.collect()
    assert torch.equal(safetensors.torch.load(again)["b"], saved["b"])


def test_tensors_that_begin_elsewhere_are_moved(tmp_path: Path) -> None:
    """A product's last bits depend on where its factors begin."""
    saved = {"a": torch.rand(256, 129), "b": torch.rand(3).to(torch.bfloat16)}
    for name, tensor in parse_weights("w.safetensors", read(tmp_path, saved)).items():
        assert torch.equal(tensor, saved[name])
        assert tensor.data_ptr() % BOUNDARY == 0


class Code:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code in a pickle was run')",)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("w.safetensors", b""),
        ("w.safetensors", b"\xff" * 64),
        ("w.safetensors", pickled(TENSORS)),
        ("w.safetensors", headed([])),
        ("w.safetensors", headed({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}})),
        # A dtype that newer versions of safetensors know in Rust and not in Python.
        (
            "w.safetensors",
            headed({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"123"),
        ),
        ("w.bin", b""),
        ("w.bin", safetensors.torch.save(TENSORS)),
        ("w.bin", pickled(TENSORS)[:-40]),
        ("w.bin", pickled(Code())),
        ("w.bin", pickled([1, 2])),
        ("w.bin", pickled({"a": 1})),
        ("w.bin", pickled({1: torch.ones(1)})),
        ("w.bin", pickled({"a": torch.ones(2, 2).to_sparse()})),
        ("w.bin", pickled({"a": torch.ones(2, device="meta")})),
    ],
)
def test_no_weights(name: str, data: bytes) -> None:
    """What is no such file is an error that names it, whatever the parser says."""
    with pytest.raises(IntegrityError, match="saved a file of tensors, found something") as caught:
        parse_weights(name, data)
    assert caught.value.file == name


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_flipped_bits(name: str) -> None:
    """A flip of a bit anywhere gives weights, other ones perhaps, or the one error."""
    data = pickled(TENSORS) if name == "w.bin" else safetensors.torch.save(TENSORS)
    refused = 0
    for offset in range(0, len(data), max(1, len(data) // 400)):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << offset % 8
        try:
            parse_weights(name, bytes(flipped))
        except IntegrityError:
            refused += 1
    assert refused > 0
