"""Tests of how tensors stand in manifests."""

from __future__ import annotations

import attrs
import pytest
import torch
from blake3 import blake3

from peftstate._codec import decode, encode
from peftstate.sections._tensors import (
    SAMPLED_BYTES,
    SAMPLED_PLACES,
    SidecarTensor,
    TensorRecord,
    digest,
    dtype_name,
    dtype_named,
    is_readable,
    sidecar_tensors,
    tensor_record,
    tensor_records,
    with_tensors,
)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_digest_is_over_dtype_shape_and_bytes(dtype):
    """Whoever knows BLAKE3 can work a digest out from a tensor as safetensors stores it."""
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    raw = tensor.view(torch.uint8).numpy().tobytes()
    assert digest(tensor) == blake3(f"{dtype_name(dtype)}[2, 3]\n".encode() + raw).hexdigest()


def test_digest_tells_dtype_shape_and_every_bit():
    """What differs in anything but its place in memory has another digest."""
    tensor = torch.arange(6, dtype=torch.float32)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[5] ^= 1
    others = [tensor.view(torch.int32), tensor.reshape(2, 3), tensor.reshape(6, 1), flipped]
    assert len({digest(other) for other in [tensor, *others]}) == 5


def test_digest_tells_the_zeros_and_nans_apart():
    """Equality of numbers is not equality of bits."""
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert digest(nan) == digest(nan.clone())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(12)[::2],
        torch.arange(3).expand(4, 3),
        torch.nn.Parameter(torch.ones(3)),
    ],
    ids=["transposed", "strided", "expanded", "parameter"],
)
def test_digest_depends_on_no_layout(tensor):
    """How a tensor lies in memory is not part of it."""
    assert digest(tensor) == digest(tensor.detach().clone().contiguous())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_digest_of_a_scalar_and_of_nothing(shape):
    """Tensors without a dimension, or without an element, have digests, too."""
    assert len(digest(torch.ones(shape))) == 64


def test_digest_over_another_dtype():
    """An upcast tensor compares with what it was: it is digested in the dtype that is asked for."""
    tensor = torch.randn(5).bfloat16()
    assert digest(tensor.float(), "bfloat16") == digest(tensor)
    assert digest(torch.randn(5), "bfloat16") != digest(tensor)


def test_sampled_digest_reads_the_ends_of_a_long_tensor():
    """It tells weights apart that differ in many places, and not what lies between its places."""
    tensor = torch.zeros(4 * SAMPLED_BYTES * SAMPLED_PLACES, dtype=torch.uint8)
    sampled = digest(tensor, sampled=True)
    for place, seen in ((0, True), (-1, True), (SAMPLED_BYTES + 1, False)):
        changed = tensor.clone()
        changed[place] = 1
        assert (digest(changed, sampled=True) != sampled) is seen
        assert digest(changed) != digest(tensor)


def test_sampled_digest_of_a_short_tensor_is_the_full_one():
    """Where there is little to read all of it is read."""
    tensor = torch.zeros(SAMPLED_BYTES * SAMPLED_PLACES, dtype=torch.uint8)
    assert digest(tensor, sampled=True) == digest(tensor)


def test_tensor_that_cannot_be_read_has_no_digest():
    """A tensor on the meta device is described by its dtype and shape alone."""
    tensor = torch.empty(2, 3, device="meta")
    assert not is_readable(tensor)
    assert tensor_record(tensor) == TensorRecord(dtype="float32", shape=(2, 3), digest=None)


def test_tensor_that_shall_not_be_read_has_no_digest():
    """`read=False` leaves the bytes alone."""
    assert tensor_record(torch.ones(2), read=False).digest is None


def test_record_over_another_dtype_says_so():
    """The dtype of a record is the one its digest is over."""
    tensor = torch.ones(2)
    assert tensor_record(tensor, "bfloat16") == tensor_record(tensor.bfloat16())


def test_records_come_in_the_order_of_their_names():
    """So that what is written does not depend on how a model is built."""
    records = tensor_records({"b": torch.ones(1), "a": torch.zeros(1)})
    assert list(records) == ["a", "b"]
    assert records["a"] == tensor_record(torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_dtype_is_found_by_its_name(dtype):
    """A dtype survives a manifest."""
    assert dtype_named(dtype_name(dtype)) is dtype


@pytest.mark.parametrize(
    "name", ["", "Tensor", "nn", "float", "torch.float32", "strided", "preserve_format", "__name__"]
)
def test_only_dtypes_are_found(name):
    """No other attribute of torch is reached by a manifest."""
    with pytest.raises(ValueError, match="no dtype"):
        dtype_named(name)


@attrs.frozen(kw_only=True)
class Inner:
    """A record with a tensor."""

    state: SidecarTensor


@attrs.frozen(kw_only=True)
class Outer:
    """A record with tensors in all places."""

    plain: int
    inner: Inner | None
    many: dict[str, SidecarTensor]
    row: tuple[Inner, ...]


@pytest.fixture
def tensors():
    """Four tensors by their names in the sidecar."""
    return {name: torch.full((2,), float(place)) for place, name in enumerate("abcd")}


@pytest.fixture
def record(tensors):
    """A record that has them in all places where a record may."""
    a, b, c, d = (SidecarTensor.of(name, tensor) for name, tensor in tensors.items())
    return Outer(plain=1, inner=Inner(state=a), many={"x": b, "y": c}, row=(Inner(state=d),))


def test_sidecar_tensors_are_found_wherever_they_are(record):
    """In records, mappings and tuples, however deep."""
    assert [tensor.tensor for tensor in sidecar_tensors(record)] == ["a", "b", "c", "d"]


def test_sidecar_tensor_is_described_not_contained(record, tensors):
    """The JSON has dtype, shape and digest; equality is that of what it has."""
    (first, *_) = sidecar_tensors(record)
    assert encode(first) == {
        "tensor": "a",
        "dtype": "float32",
        "shape": [2],
        "digest": digest(tensors["a"]),
    }
    read = decode(encode(first), SidecarTensor)
    assert read == first
    with pytest.raises(ValueError, match="'a' of the sidecar was not loaded"):
        read.load()


def test_sidecar_tensors_are_filled_in(record, tensors):
    """What was read goes to its place in a record; the rest of the record stays."""
    without = with_tensors(record, dict.fromkeys(tensors))
    filled = with_tensors(without, tensors)
    assert filled == record
    assert [tensor.load() for tensor in sidecar_tensors(filled)] == list(tensors.values())
    assert filled.plain == 1
