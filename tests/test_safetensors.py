"""Reading safetensors from memory: what is taken is what the library of that name takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftstate import _safetensors
from peftstate._safetensors import DTYPES, MAX_HEADER, MAX_TENSORS, stored, stored_digests
from peftstate.sections._tensors import digest, dtype_named

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
FILE = safetensors.torch.save(TENSORS, {"format": "pt"})


def headed(header: Any, data: bytes = b"") -> bytes:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1), **more: Any) -> Any:
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def described(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors that are found."""
    return {key: (t.dtype, t.shape, bytes(t.data)) for key, t in stored(data).items()}


def by_the_library(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors that safetensors finds."""
    return {
        key: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for key, tensor in safetensors.torch.load(data).items()
    }


def test_tensors_are_parts_of_what_was_read() -> None:
    """Nothing is copied, so that what a tensor holds is what the file held."""
    data = bytearray(FILE)
    found = stored(data)
    data[-1] ^= 1
    assert described(bytes(data)) == {
        key: (t.dtype, t.shape, bytes(t.data)) for key, t in found.items()
    }


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name: str) -> None:
    """Each is torch's of that name, of as many bytes."""
    dtype, size = DTYPES[name]
    assert dtype_named(dtype).itemsize == size
    data = headed({"a": entry(name, [3], [0, 3 * size])}, bytes(3 * size))
    assert described(data) == {"a": (dtype, (3,), bytes(3 * size))}


def test_dtypes_of_the_library() -> None:
    """They are ours, by the same names; what it has since then is refused as unknown."""
    known = {name: str(dtype).removeprefix("torch.") for name, dtype in torch_types().items()}
    ours = {name: dtype for name, (dtype, _) in DTYPES.items()}
    assert known.items() <= ours.items()


def torch_types() -> dict[str, torch.dtype]:
    """The dtypes of safetensors."""
    types: dict[str, torch.dtype] = vars(safetensors.torch)["_TYPES"]
    return types


def least_size() -> int:
    """The least size of a tensor that safetensors reads: its older versions read no empty one."""
    try:
        safetensors.torch.load(safetensors.torch.save({"a": torch.ones(0)}))
    except ValueError:
        return 1
    return 0


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
            st.lists(st.integers(least_size(), 3), max_size=3),
        ),
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_what_the_library_writes_is_read(shapes: Any) -> None:
    """Scalars, empty tensors and names of any kind included."""
    tensors = {
        name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in shapes.items()
    }
    tensors.pop("__metadata__", None)
    data = safetensors.torch.save(tensors)
    assert described(data) == by_the_library(data)


NUMBERS = st.integers(-1, 12) | st.just(2**64) | st.booleans() | st.floats(0, 4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "", 1]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    },
    optional={"more": st.none()},
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES, max_size=2))
@settings(max_examples=300, deadline=None)
def test_what_is_taken_is_what_the_library_takes(header: Any) -> None:
    """A header that is made up gives the same tensors as there, or is refused."""
    data = headed(header, bytes(range(12)))
    try:
        found = described(data)
    except ValueError:
        return
    assert found == by_the_library(data)


@given(st.integers(0, len(FILE) - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_byte_that_is_another(offset: int, byte: int) -> None:
    """A damaged file gives the same tensors as the library, or is refused."""
    data = bytearray(FILE)
    data[offset] = byte
    try:
        found = described(bytes(data))
    except ValueError:
        return
    assert found == by_the_library(bytes(data))


def of_fours(first: Any, second: Any) -> bytes:
    """Two tensors of bytes in a file that has 8."""
    return headed({"a": entry(shape=[4], offsets=first), "b": entry(shape=[4], offsets=second)})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x10" + bytes(7), "a header of 16 bytes in a file of 8"),
        (bytes(16), "a header of 0 bytes in a file of 16"),
        (
            (MAX_HEADER + 1).to_bytes(8, "little"),
            f"a header of {MAX_HEADER + 1} bytes; it may have {MAX_HEADER}",
        ),
        (headed(b"{" * (MAX_TENSORS + 3)), f"more than {MAX_TENSORS} tensors"),
        (headed([]), "a header that is no object"),
        (headed(b'{"a": 1, "a": 1}'), "key 'a' stands twice"),
        (headed({"__metadata__": {"a": 1}}), "metadata that is no object of strings"),
        (headed({"a": 1}), "'a' is not described by dtype, shape and data_offsets"),
        (headed({"a": entry(more=1)}), "'a' is not described by dtype, shape and data_offsets"),
        (headed({"a": entry("F4")}), "'a' has the unknown dtype 'F4'"),
        (headed({"a": entry(dtype=[])}), "'a' has the unknown dtype []"),
        (headed({"a": entry(shape=[-1])}), "'a' has [-1] for numbers"),
        (headed({"a": entry(shape=[True])}), "'a' has [True] for numbers"),
        (headed({"a": entry(shape=[1] * 65)}), "'a' has more than 64 dimensions"),
        (headed({"a": entry(offsets=[0])}), "'a' does not begin and end at a byte"),
        (headed({"a": entry()}), "0 bytes of tensors, of which 1 are described"),
        (headed({"a": entry(shape=[3])}, b"1"), "'a' of shape (3,) has bytes 0 to 1"),
        (headed({"a": entry(offsets=[1, 0])}, b"1"), "'a' of shape (1,) has bytes 1 to 0"),
        (of_fours([0, 4], [3, 7]) + bytes(8), "'b' begins at byte 3, where none ends"),
        (of_fours([0, 4], [5, 9]) + bytes(9), "'b' begins at byte 5, where none ends"),
        (of_fours([4, 8], [0, 4]) + bytes(9), "9 bytes of tensors, of which 8 are described"),
        (headed({"a" * 200: 1}), f"'{'a' * 79}… is not described by dtype, shape and data_offsets"),
    ],
)
def test_refusals(data: bytes, reason: str) -> None:
    """The text says what is wrong."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        stored(data)
    assert str(caught.value) == reason


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Callable[[bytes], BufferedReader]]:
    """Opens a file of some content."""
    with ExitStack() as stack:

        def opened(data: bytes) -> BufferedReader:
            (tmp_path / "file").write_bytes(data)
            return stack.enter_context((tmp_path / "file").open("rb"))

        yield opened


@pytest.mark.parametrize("at_once", [1, 7, 2**24])
def test_digests_of_a_file(
    written: Callable[[bytes], BufferedReader], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the tensors, in however many pieces the file is read."""
    monkeypatch.setattr(_safetensors, "_AT_ONCE", at_once)
    tensors = {**TENSORS, "empty": torch.ones(0, 3), "scalar": torch.tensor(1.0)}
    found = stored_digests(written(safetensors.torch.save(tensors)))
    assert {name: rest for name, *rest in found} == {
        name: [str(t.dtype).removeprefix("torch."), tuple(t.shape), digest(t)]
        for name, t in tensors.items()
    }


def test_a_file_that_ends_while_it_is_read(
    written: Callable[[bytes], BufferedReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives no digest of what is not there."""
    file = written(FILE[:-1])
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result([*[0] * 6, len(FILE), *[0] * 3]))
    with pytest.raises(ValueError, match="the file ends early"):
        list(stored_digests(file))
