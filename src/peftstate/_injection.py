"""Between what was read and PEFT: what it is handed to load, and what is set afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from peftstate._codec import dumps
from peftstate._storage import ADAPTER_CONFIG_NAME
from peftstate.sections import extra_tensors
from peftstate.sections._adapter_tensors import adapter_tensors, live_tensors
from peftstate.sections._tensors import tensor_record

if TYPE_CHECKING:
    from peftstate._source import AdapterFiles, Source
    from peftstate._steps import Plan
    from peftstate.manifest import Manifest
    from peftstate.sections._view import ModelView


def set_tensors(
    view: ModelView, files: Mapping[str, AdapterFiles], manifest: Manifest, plan: Plan
) -> None:
    """Set the adapters' live tensors from the bytes that were read, in their saved dtypes.

    PEFT has loaded the same file, but into tensors of the dtype it chose, which rounds. Of tensors
    that PEFT computes when it saves (a prompt's embedding), what they are computed from is set, for
    which the sidecar is read. All that comes before an adapter is merged into the base model.
    A tensor that is right already stays as it is, for it may share its memory with another one.
    """
    records = manifest.sections["adapters"].adapters
    for saved, read in files.items():
        targets = adapter_tensors(
            view, saved, embeddings=records[saved].embeddings_saved, names=read.tensors.keys()
        ).saved
        for name, target in targets.items():
            tensor = read.tensors[name]
            if target.shape != tensor.shape:
                continue  # the comparison afterwards names it
            if tensor_record(target) != records[saved].tensors[name]:
                _set(target, tensor)
    if extra_tensors.SECTION in plan.sections(view, manifest):
        extra_tensors.restore_adapters(manifest.sections["extra_tensors"], view)


def _set(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Give a tensor other values, and their dtype, in memory of its own.

    The layout, which the last bits of a product depend on, is kept: where LoRA ties the adapters of
    tied embeddings, one tensor is another one transposed
    (`peft/tuners/lora/model.py::LoraModel._create_and_replace`).
    """
    target.data = torch.empty_like(target, dtype=tensor.dtype).copy_(tensor)


@contextmanager
def readable_by_peft(source: Source, name: str) -> Iterator[Path]:
    """A folder from which PEFT can read an adapter.

    The folder itself, unless a save in it was not finished: then its files are spread over two
    places, and what was read is written out again.
    """
    record = source.manifest.sections["adapters"].adapters[name]
    if not source.folder.is_pending:
        yield source.folder.path / record.folder
        return
    files = source.adapters[name]
    with tempfile.TemporaryDirectory(prefix="peftstate-") as directory:
        Path(directory, ADAPTER_CONFIG_NAME).write_bytes(dumps(files.config))
        safetensors.torch.save_file(
            dict(files.tensors), Path(directory, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"}
        )
        yield Path(directory)


@contextmanager
def harmless_state_dict(model: nn.Module) -> Iterator[None]:
    """Have ``model.state_dict()`` leave 4-bit layers alone, in a model that others may be running.

    PEFT calls it while it loads an adapter, for the names only
    (`peft/tuners/tuners_utils.py::BaseTuner._remap_adapter_state_dict_for_load`).
    """
    vars(model)["state_dict"] = lambda *_, **__: live_tensors(model)
    try:
        yield
    finally:
        del vars(model)["state_dict"]
