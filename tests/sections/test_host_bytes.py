"""The bytes of a tensor reach the host in the order in which they are in it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from peftstate._digest import pieces_digest, tensor_digest
from peftstate.sections import _host_bytes
from peftstate.sections._tensors import digest


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_tensor_on_the_cpu_is_one_piece(size):
    """It is not copied."""
    raw = torch.arange(size).to(torch.uint8)
    (piece,) = _host_bytes.host_bytes(raw)
    assert bytes(piece) == bytes(raw.tolist())


def test_pieces_give_the_digest_of_the_whole():
    """Also if they lie in the same memory, one after the other."""

    def pieces():
        buffer = bytearray(2)
        for start in (0, 2, 4):
            buffer[:] = b"abcdef"[start : start + 2]
            yield buffer

    assert pieces_digest("uint8", [6], pieces()) == tensor_digest("uint8", [6], b"abcdef")


def test_other_threads_find_what_this_one_wrote(monkeypatch):
    """Each CUDA device is waited for once, and nothing else is."""
    waited = []

    def current_stream(device):
        return SimpleNamespace(synchronize=lambda: waited.append(str(device)))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    devices = ["cuda:1", "cpu", "meta", "cuda:0", "cuda:1"]
    _host_bytes.wait_until_written(
        SimpleNamespace(device=torch.device(device)) for device in devices
    )
    assert sorted(waited) == ["cuda:0", "cuda:1"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a CUDA device")
@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250, 1000])
def test_a_tensor_on_a_cuda_device_has_the_digest_it_has_on_the_cpu(size, monkeypatch):
    """However many pieces it is copied in."""
    monkeypatch.setattr(_host_bytes, "CHUNK", 100)
    tensor = torch.arange(size, dtype=torch.float32)
    assert digest(tensor.cuda()) == digest(tensor)
