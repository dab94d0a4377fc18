"""Parsing the file with an adapter's weights, from bytes that were read once."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from peftstate._diff import printable
from peftstate.errors import IntegrityError
from peftstate.sections._tensors import (
    SidecarTensor,
    TensorRecord,
    tensor_record,
    tensor_records,
)

MAX_HEADER = 32 * 1024 * 1024
"""Bytes of the header of a safetensors file; that of 100,000 tensors has 15 MB."""
MAX_TENSORS = 2**17
"""Tensors in a file; LoRA on every expert of the largest mixtures has 90,000."""
_SHOWN = 80
"""Characters of a name that a message shows."""


def parse_weights(name: str, data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a weights file.

    Args:
        name: The file, for errors; its ending tells the format. A ``.bin`` file is a pickle,
            which PEFT writes on request, and is read with ``weights_only=True``.
        data: Its content.

    Raises:
        IntegrityError: It is not such a file.
    """
    try:
        if not name.endswith(".bin"):
            _check_header(data)
            return safetensors.torch.load(data)
        _check_archive(data)
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged bytes, these parsers raise anything
        reason = f"{type(error).__name__}: {error}"
        raise IntegrityError(name, "a file of tensors", f"something else ({reason})") from error
    return _named_tensors(name, loaded, most=len(data))


def _check_header(data: bytes) -> None:
    """Refuse a safetensors file whose header takes long to parse, or much memory.

    safetensors takes 100 MB: 1.4 million empty tensors, for which it needs 5 s and 1 GB.

    Raises:
        ValueError: It does.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes; it may have {MAX_HEADER}")
    # each tensor is an object, beside which there are the header itself and its metadata
    if data.count(b"{", 8, 8 + length) > MAX_TENSORS + 2:
        raise ValueError(f"more than {MAX_TENSORS} tensors")


def _check_archive(data: bytes) -> None:
    """Refuse a file of `torch.save` that would unpack to more than its own size.

    Raises:
        ValueError: It would, or it is in the format of torch before 1.6.
        BadZipFile: It is damaged, or none such.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("a compressed archive")
    if sum(entry.file_size for entry in entries) > len(data) or len(entries) > MAX_TENSORS:
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
    for name in sorted(found):
        record = tensor_record(found[name], read=False)
        for field in ("dtype", "shape"):
            _check_field(f"{file}[{printable(name)}]", field, getattr(saved[name], field), record)
    for name, record in tensor_records(found).items():
        if saved[name].digest is not None:
            _check_field(f"{file}[{printable(name)}]", "digest", saved[name].digest, record)


def _check_field(file: str, field: str, wanted: object, record: TensorRecord) -> None:
    """Refuse a tensor of which something is not as the manifest says."""
    found = getattr(record, field)
    if wanted != found:
        raise IntegrityError(file, f"{field} {wanted}", f"{found}")
