"""Parsing the file with an adapter's weights, from bytes that were read once."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from peftstate._diff import printable
from peftstate._disk import BOUNDARY
from peftstate._safetensors import MAX_TENSORS, Stored, stored
from peftstate.errors import IntegrityError
from peftstate.sections._tensors import (
    SidecarTensor,
    TensorRecord,
    aligned,
    dtype_named,
    tensor_records,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SHOWN = 80
"""Characters of a name that a message shows."""


def parse_weights(name: str, data: Buffer) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, each with a memory of its own or a part of the file's.

    Args:
        name: The file, for errors; its ending tells the format. A ``.bin`` file is a pickle,
            which PEFT writes on request, and is read with ``weights_only=True``.
        data: Its content, which belongs to the tensors from then on, if it may be written to.

    Raises:
        IntegrityError: It is not such a file.
    """
    try:
        if not name.endswith(".bin"):
            return {key: _torch_tensor(tensor) for key, tensor in stored(data).items()}
        archive = io.BytesIO(data)
        _check_archive(archive)
        loaded = torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged bytes, these parsers raise anything
        reason = f"{type(error).__name__}: {error}"
        raise IntegrityError(name, "a file of tensors", f"something else ({reason})") from error
    return _named_tensors(name, loaded, most=memoryview(data).nbytes)


def _torch_tensor(tensor: Stored) -> torch.Tensor:
    """A tensor of a file: the memory that it was read into, if torch would have it there.

    A product's last bits may depend on where its factors begin.
    """
    dtype = dtype_named(tensor.dtype)
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    if tensor.data.readonly:
        tensor = attrs.evolve(tensor, data=memoryview(bytearray(tensor.data)))
    found = torch.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)
    return found if found.data_ptr() % BOUNDARY == 0 else aligned(found)


def _check_archive(data: io.BytesIO) -> None:
    """Refuse a file of `torch.save` that would unpack to more than its own size.

    Raises:
        ValueError: It would, or it is in the format of torch before 1.6.
        BadZipFile: It is damaged, or none such.
    """
    with zipfile.ZipFile(data) as archive:
        entries = archive.infolist()
    data.seek(0)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("a compressed archive")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > len(data.getbuffer()) or len(entries) > MAX_TENSORS:
        raise ValueError("an archive that claims to hold more than it does")


def _named_tensors(name: str, loaded: Any, *, most: int) -> dict[str, torch.Tensor]:
    """What was in a pickle, if it is tensors such as PEFT saves.

    Args:
        name: The file, for errors.
        loaded: What was in it.
        most: The most bytes that a tensor can have; one value may be repeated by a stride of 0.

    Raises:
        IntegrityError: It is something else.
    """
    if not isinstance(loaded, dict):
        found = f"something else (a {type(loaded).__name__})"
        raise IntegrityError(name, "a file of tensors", found)
    for key, value in loaded.items():
        is_tensor = isinstance(key, str) and isinstance(value, torch.Tensor)
        if not is_tensor or not _is_plain(value) or value.nbytes > most:
            found = f"something else (a {type(value).__name__}) under {key!r}"
            raise IntegrityError(name, "a file of tensors", found)
    return dict(loaded)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all in memory, so that its bytes can be digested."""
    return (
        tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    )


def check_tensors(
    file: str, found: Mapping[str, torch.Tensor], saved: Mapping[str, TensorRecord | SidecarTensor]
) -> None:
    """Compare tensors that were read with what the manifest says of them.

    Raises:
        IntegrityError: A tensor is missing, unknown, of another dtype or shape, or has other
            values. `file` names it.
    """
    for name in sorted(found.keys() ^ saved.keys()):
        there, absent = f"a tensor {name[:_SHOWN]!r}", "none of that name"
        raise IntegrityError(file, *((there, absent) if name in saved else (absent, there)))
    for name, record in tensor_records(found).items():
        for field in ("dtype", "shape", "digest"):
            wanted, actual = getattr(saved[name], field), getattr(record, field)
            if wanted not in (None, actual):  # it may have been unreadable where it was saved
                place = f"{file}[{printable(name)}]"
                raise IntegrityError(place, f"{field} {wanted}", f"{actual}")
