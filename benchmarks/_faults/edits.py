"""Small changes of files, as a disk, a copy, an editor or another program makes them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "peftstate.json"
SIDECAR = "peftstate.tensors"

HEADER_AT = 8
"""Where the JSON of a safetensors file begins, after its length."""


def data_at(file: Path) -> int:
    """Where the tensors of a safetensors file begin, behind its header."""
    return HEADER_AT + int.from_bytes(file.read_bytes()[:HEADER_AT], "little")


def flip(file: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit; a negative offset counts from the end."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


def zero(file: Path, offset: int, count: int) -> None:
    """Lose a page of a file."""
    data = bytearray(file.read_bytes())
    count = min(count, len(data) - offset)
    data[offset : offset + count] = bytes(count)
    file.write_bytes(data)


def cut(file: Path, keep: Callable[[int], int]) -> None:
    """Keep the first bytes of a file: as many as are left of its size."""
    data = file.read_bytes()
    file.write_bytes(data[: keep(len(data))])


def append(file: Path, data: bytes) -> None:
    """Add bytes at the end."""
    file.write_bytes(file.read_bytes() + data)


def replace(file: Path, old: bytes, new: bytes) -> None:
    """Replace text that must be there, the first time it stands there.

    Raises:
        ValueError: It is not there.
    """
    data = file.read_bytes()
    if old not in data:
        raise ValueError(f"{file} does not hold {old!r}")
    file.write_bytes(data.replace(old, new, 1))


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file, as an editor would."""
    value = json.loads(file.read_bytes())
    change(value)
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")


def set_json(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    edit_json(file, lambda value: value.update(fields))


def edit_tensors(file: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Write a safetensors file anew, with other tensors."""
    import safetensors.torch

    tensors = safetensors.torch.load(file.read_bytes())
    changed = {name: tensor.contiguous() for name, tensor in change(tensors).items()}
    file.write_bytes(safetensors.torch.save(changed, {"format": "pt"}))


def edit_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file, and leave its data alone."""
    data, start = file.read_bytes(), data_at(file)
    header = json.loads(data[HEADER_AT:start])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_AT)
    file.write_bytes(len(text).to_bytes(HEADER_AT, "little") + text + data[start:])


def replace_by_folder(file: Path) -> None:
    """Put a folder where a file was."""
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path, target: Path) -> None:
    """Put a link where a file was."""
    file.unlink()
    file.symlink_to(target)


def write_unknown_dtype(file: Path) -> None:
    """Write a file with one tensor, of a dtype that safetensors may know and torch does not."""
    header = {"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(HEADER_AT, "little") + text + b"123")


@contextmanager
def written_to(pipe: Path) -> Iterator[None]:
    """Have somebody open a named pipe after a while, so that nobody who reads it hangs for ever."""
    command = ["/bin/sh", "-c", 'sleep 2; : > "$0"', str(pipe)]
    with subprocess.Popen(command, start_new_session=True) as writer:  # noqa: S603
        try:
            yield
        finally:
            os.killpg(writer.pid, signal.SIGKILL)


class _CapabilityHeader(ctypes.Structure):
    """`cap_user_header_t` of capget(2)."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    """`cap_user_data_t` of capget(2)."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


_VERSION_3 = 0x20080522
_OVERRIDE = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what makes root read every file."""


@contextmanager
def permissions_obeyed() -> Iterator[None]:
    """Have this thread obey the permissions of files in the body, also where it is root's."""
    if sys.platform != "linux" or os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _CapabilityHeader(_VERSION_3, 0), (_CapabilityData * 2)()
    _call(libc.capget, header, data)
    before = data[0].effective
    data[0].effective = before & ~_OVERRIDE
    _call(libc.capset, header, data)
    try:
        yield
    finally:
        data[0].effective = before
        _call(libc.capset, header, data)


def _call(function: Any, header: _CapabilityHeader, data: Any) -> None:
    """Call capget(2) or capset(2).

    Raises:
        OSError: It failed.
    """
    if function(ctypes.byref(header), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
