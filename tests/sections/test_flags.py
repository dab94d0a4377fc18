"""Tests of the table of torch's settings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from peftstate.sections import _flags

VALUES = [(name, value) for name, flag in _flags.flags().items() for value in flag.allowed]


@pytest.fixture(autouse=True)
def values():
    """All settings as torch has them, which must be the same after the test."""
    before = _flags._read()
    yield before
    assert _flags._read() == before


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_every_allowed_value_can_be_set_and_is_put_back(name, value):
    """What a manifest may say of a flag, torch takes; afterwards all flags are as before."""
    with _flags.set_to({name: value}):
        assert _flags.read()[name] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_dtype", "complex64"),
        ("cudnn.benchmark", 1),
        ("cudnn.benchmark", "True"),
        ("deterministic_algorithms", True),
        ("float32_matmul_precision", ["high"]),
        ("cuda.matmul.allow_tf32", True),
        ("__class__", "x"),
    ],
)
def test_nothing_else_can_be_set(name, value, values):
    """A value of another type, an unknown value and an unknown name are passed over."""
    with _flags.set_to({name: value}):
        assert _flags._read() == values


def test_put_back_after_an_exception():
    """An exception in the body comes out, and the flags are as before."""
    with pytest.raises(KeyError), _flags.set_to({"default_dtype": "bfloat16"}):
        raise KeyError


def test_many_at_once_are_all_put_back():
    """Old and new settings of TF32, which depend on each other, come back together."""
    wanted = {
        "float32_matmul_precision": "medium",
        "cudnn.allow_tf32": False,
        "cudnn.rnn.fp32_precision": "tf32",
        "mkldnn.conv.fp32_precision": "bf16",
        "deterministic_algorithms": "warn",
    }
    with _flags.set_to(wanted):
        found = _flags.read()
        assert found["float32_matmul_precision"] == "medium"
        assert found["deterministic_algorithms"] == "warn"
        assert found["mkldnn.conv.fp32_precision"] == "bf16"


def test_what_torch_refuses_to_tell_is_left_out():
    """Where new settings of TF32 contradict an old one, reading does not fail."""
    with _flags.set_to({}):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        found = _flags.read()
        assert "float32_matmul_precision" not in found
        assert found["cuda.matmul.fp32_precision"] == "tf32"
        with _flags.set_to({"float32_matmul_precision": "high"}):
            assert "float32_matmul_precision" not in _flags.read()


def test_a_precision_that_is_not_set_is_the_exact_one():
    """``"none"`` and ``"ieee"`` compute the same, and are recorded as the same."""
    with _flags.set_to({}):
        before = _flags.read()
        torch.set_float32_matmul_precision("highest")
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert _flags.read() == before


def test_a_precision_that_follows_another_follows_it_again():
    """What was taken from the setting of all back ends is not fixed by being put back."""
    torch.backends.fp32_precision = "tf32"
    try:
        with _flags.set_to({"mkldnn.conv.fp32_precision": "ieee"}):
            assert torch.backends.mkldnn.conv.fp32_precision == "ieee"
        assert torch.backends.mkldnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"
    assert torch.backends.mkldnn.conv.fp32_precision == "none"


def test_reading_neither_warns_nor_starts_a_device():
    """A process that reads all flags issues no warning, and holds no CUDA context."""
    code = (
        "import torch\n"
        "from peftstate.sections import _flags\n"
        "assert len(_flags.read()) > 15\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
