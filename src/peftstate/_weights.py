"""Parsing the file with an adapter's weights, from bytes that were read once."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch

from peftstate.errors import IntegrityError
from peftstate.sections._tensors import SidecarTensor, TensorRecord, tensor_records


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
        if name.endswith(".bin"):
            loaded: dict[str, torch.Tensor] = torch.load(
                io.BytesIO(data), map_location="cpu", weights_only=True
            )
            return loaded
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise IntegrityError(name, "a file of tensors", f"something else ({error})") from error


def check_tensors(
    file: str, found: Mapping[str, torch.Tensor], saved: Mapping[str, TensorRecord | SidecarTensor]
) -> None:
    """Compare tensors that were read with what the manifest says of them.

    Raises:
        IntegrityError: A tensor is missing, unknown, of another dtype or shape, or has other
            values. `file` names it.
    """
    for name in sorted(found.keys() ^ saved.keys()):
        there, absent = f"a tensor {name!r}", "none of that name"
        raise IntegrityError(file, *((there, absent) if name in saved else (absent, there)))
    for name, record in tensor_records(found).items():
        expected = saved[name]
        for field in ("dtype", "shape", "digest"):
            wanted, actual = getattr(expected, field), getattr(record, field)
            if wanted is not None and wanted != actual:
                raise IntegrityError(f"{file}[{name}]", f"{field} {wanted}", f"{actual}")
