"""Sidecars and weights: files of tensors that are none, and tensors that are not what they seem."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._hostile.case import (
    SIDECAR,
    WEIGHTS,
    Case,
    both,
    edited,
    header,
    section,
    tensor_records,
    with_file,
    with_tensor,
)
from peftstate._safetensors import MAX_HEADER, MAX_TENSORS
from peftstate.errors import (
    AdapterMismatchError,
    IntegrityError,
    ManifestDecodeError,
    RestoreError,
    StateMismatchError,
)


def _one(**fields: Any) -> dict[str, Any]:
    """A header of one tensor."""
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}


def _many(count: int) -> Callable[[], bytes]:
    """A file of very many empty tensors, which safetensors takes up to 100 MB of."""

    def make() -> bytes:
        empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        entries = ",".join(f'"{number}":{empty}' for number in range(count))
        return header(None, f"{{{entries}}}".encode())

    return make


_TWO = {
    "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
}
_GAP = {**_TWO, "b": {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]}}
_BYTE = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
_DOUBLE = b"{" + _BYTE % (0, 1) + b"," + _BYTE % (1, 2) + b"}"

_FILES: dict[str, tuple[str, bytes | Callable[[], bytes]]] = {
    "no header": ("a reader of 8 bytes", b"\0" * 4),
    "a header of 2**63 bytes": ("memory", header(2**63, b"{}")),
    "a header of 2**64 - 8 bytes": ("an addition that overflows", header(2**64 - 8, b"{}")),
    "a header longer than the file": ("a read beyond the end", header(1000, b"{}")),
    "a header that is too long": ("memory", lambda: header(None, b"{" + b" " * MAX_HEADER + b"}")),
    "1.4 million tensors": ("5 s and 1 GB in safetensors", _many(1_400_000)),
    "one tensor too many": ("memory", _many(MAX_TENSORS + 2)),
    "a header that is no JSON": ("the parser", header(None, b"\xff\xfe" * 50)),
    "a header of brackets": ("the stack", header(None, b"[" * 1_000_000)),
    "a header of objects": ("the stack", header(None, b'{"a":' * 100_000)),
    "a negative shape": ("a size that is huge", header(None, _one(shape=[-1]), bytes(4))),
    "a shape that overflows": (
        "a product that is small",
        header(None, _one(shape=[2**32, 2**32]), bytes(4)),
    ),
    "a shape without data": ("memory", header(None, _one(shape=[2**40]), bytes(4))),
    "a shape of floats": ("types", header(None, _one(shape=[1.0]), bytes(4))),
    "an unknown dtype": ("a table", header(None, _one(dtype="__class__"), bytes(4))),
    "offsets that overlap": ("one tensor that changes another", header(None, _TWO, bytes(6))),
    "offsets with a gap": ("bytes that nobody sees", header(None, _GAP, bytes(10))),
    "offsets backwards": ("a negative size", header(None, _one(data_offsets=[4, 0]), bytes(4))),
    "offsets beyond the end": (
        "a read beyond the end",
        header(None, _one(shape=[250], data_offsets=[0, 1000]), bytes(4)),
    ),
    "bytes behind the end": ("a second file in one", header(None, _one(), bytes(400))),
    "a tensor twice": ("two readers, first and last", header(None, _DOUBLE, bytes(2))),
    "a pickle": ("pickle.load", pickle.dumps({"a": 1})),
}


def _replaced(name: str, data: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    """A file with other content, recorded as it is."""
    return with_file(name, lambda _: data() if callable(data) else data)


class _Evil:
    """What pickles itself as a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("evil_module",)


def _archive(content: Any, *, compressed: bool = False, padding: int = 0) -> bytes:
    """A file as `torch.save` makes it, with what is wanted in it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if not compressed:
        return buffer.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in source.infolist():
            data = source.read(entry) + bytes(padding)
            target.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _bin(data: Callable[[], bytes]) -> Callable[[Path], object]:
    """A file of weights in PEFT's other format, with the right record."""

    def make(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "adapter_model.bin").write_bytes(b"")
        edited(lambda value: value["files"].pop(WEIGHTS))(folder)
        _replaced("adapter_model.bin", data)(folder)

    return make


_BINS = {
    "a pickle that imports": (
        "torch.load, which would run it",
        lambda: _archive({"a": _Evil()}),
    ),
    "a bare pickle that imports": ("pickle.load", lambda: pickle.dumps({"a": _Evil()})),
    "a compressed archive": (
        "memory: a thousand times the file",
        lambda: _archive({"a": torch.zeros(4)}, compressed=True, padding=10_000_000),
    ),
    "a tensor of one byte a trillion times": (
        "memory, by a stride of 0",
        lambda: _archive({"a": torch.zeros(1).expand(10**6, 10**6)}),
    ),
    "no tensors": ("code that expects them", lambda: _archive({"a": "text"})),
    "no mapping": ("code that expects one", lambda: _archive([torch.zeros(1)])),
}


def _clash(value: dict[str, Any]) -> None:
    """Two records of one tensor."""
    record = value["sections"]["rng"]
    record["torch_cpu"]["tensor"] = "rng.numpy"


def _elsewhere(value: dict[str, Any]) -> None:
    """A tensor of the sidecar that is called otherwise."""
    for record in tensor_records(value["sections"], "rng.numpy"):
        record["tensor"] = "../evil"


def _size(value: dict[str, Any]) -> None:
    """A file that is said to be of another size."""
    value["files"][SIDECAR]["size"] = 10**15


def _without_record(folder: Path) -> None:
    """A sidecar that the manifest does not list, of another generation."""
    edited(lambda value: value["files"].pop(SIDECAR))(folder)
    data = bytearray((folder / SIDECAR).read_bytes())
    data[-1] ^= 1
    (folder / SIDECAR).write_bytes(data)


def _overread(state: torch.Tensor) -> torch.Tensor:
    """A state of torch's generator with which it would read 2,400 bytes beyond the state."""
    raw = bytearray(state.numpy().tobytes())
    struct.pack_into("=iiq", raw, 8, 624, 1, 624)
    return torch.frombuffer(raw, dtype=torch.uint8).clone()


def _rng(tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    """A state of a generator that is another one."""
    return with_tensor(f"rng.{tensor}", change)


_STATES = {
    "a short state of Python": ("an index", _rng("python", lambda t: t[:10])),
    "a state of Python of 10 million": (
        "memory: 400 MB of integers",
        _rng("python", lambda _: torch.zeros(10_000_000, dtype=torch.int8)),
    ),
    "a state of Python of floats": (
        "a conversion",
        _rng("python", lambda _: torch.full((625,), float("nan"))),
    ),
    "negative words": ("a conversion", _rng("python", lambda t: t - 2**40)),
    "a position beyond the end of Python's": (
        "a read beyond the end",
        _rng("python", lambda t: torch.cat([t[:-1], torch.tensor([10**6])])),
    ),
    "an unknown version of Python's": (
        "an old format",
        section("rng", lambda record: record["python"].update(version=99)),
    ),
    "a short state of NumPy": ("an index", _rng("numpy", lambda t: t[:1])),
    "words of 64 bits": ("a conversion", _rng("numpy", lambda t: t + 2**40)),
    "a position of NumPy's beyond the end": (
        "a read beyond the end",
        section("rng", lambda record: record["numpy"].update(position=10**9)),
    ),
    "a negative position of NumPy's": (
        "a read before the beginning",
        section("rng", lambda record: record["numpy"].update(position=-1)),
    ),
    "another generator of NumPy": (
        "getattr(numpy.random, …)",
        section("rng", lambda record: record["numpy"].update(generator="RandomState")),
    ),
    "a generator of NumPy with dunders": (
        "getattr(numpy.random, …)",
        section("rng", lambda record: record["numpy"].update(generator="__builtins__")),
    ),
    "a short state of torch": ("a read beyond the end", _rng("torch_cpu", lambda t: t[:8])),
    "a state of torch of floats": ("a conversion", _rng("torch_cpu", lambda t: t.float())),
    "a state of torch that reads beyond itself": (
        "memory of the process",
        _rng("torch_cpu", _overread),
    ),
}

CASES = (
    *(
        Case(
            name=f"sidecar: {name}",
            attacks=attacks,
            make=_replaced(SIDECAR, data),
            error=IntegrityError,
            tells=SIDECAR,
        )
        for name, (attacks, data) in _FILES.items()
    ),
    *(
        Case(
            name=f"weights: {name}",
            attacks=attacks,
            make=_replaced(WEIGHTS, data),
            error=IntegrityError,
            tells=WEIGHTS,
        )
        for name, (attacks, data) in _FILES.items()
        if name in {"1.4 million tensors", "a shape that overflows", "a pickle"}
    ),
    *(
        Case(
            name=f"weights in a .bin: {name}",
            attacks=attacks,
            make=_bin(data),
            error=IntegrityError,
            tells="adapter_model.bin: saved a file of tensors, found something else",
        )
        for name, (attacks, data) in _BINS.items()
    ),
    Case(
        name="two records of one tensor",
        attacks="a tensor that was checked by another record",
        make=edited(_clash),
        error=ManifestDecodeError,
        tells="two different records of the sidecar's tensor 'rng.numpy'",
    ),
    Case(
        name="a tensor that is not there",
        attacks="a name that is taken for a path",
        make=edited(_elsewhere),
        error=IntegrityError,
        tells=SIDECAR,
    ),
    Case(
        name="a size of 10**15 bytes",
        attacks="memory",
        make=edited(_size),
        error=IntegrityError,
        tells="saved 1000000000000000 bytes",
    ),
    Case(
        name="a sidecar without a record",
        attacks="a check of files that are listed",
        make=_without_record,
        error=IntegrityError,
        tells=f"{SIDECAR}[",
    ),
    Case(
        name="a tensor of another shape",
        attacks="kernels that take a shape from the layer",
        make=both(
            with_tensor("base.model.norm.weight", lambda t: t[:1]),
            section("base_model", lambda r: r["tensors"]["model.norm.weight"].update(shape=[1])),
        ),
        error=StateMismatchError,
        tells="model.norm.weight",
    ),
    Case(
        name="a tensor of an adapter that it does not have",
        attacks="names of attributes",
        make=section(
            "extra_tensors",
            lambda r: r["adapters"]["default"].update(
                {"__class__": r["base"]["model.norm.weight"]}
            ),
        ),
        error=AdapterMismatchError,
        tells="extra_tensors.adapters.default.__class__",
    ),
    *(
        Case(name=name, attacks=attacks, make=make, error=RestoreError, tells="rng: ")
        for name, (attacks, make) in _STATES.items()
    ),
)
