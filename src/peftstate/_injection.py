"""Between what was read and PEFT: what it is handed to load, and what is set afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from peftstate._codec import dumps
from peftstate._storage import ADAPTER_CONFIG_NAME
from peftstate.sections import extra_tensors
from peftstate.sections._adapter_tensors import adapter_tensors

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
    """
    records = manifest.sections["adapters"].adapters
    for saved, read in files.items():
        targets = adapter_tensors(
            view, saved, embeddings=records[saved].embeddings_saved, names=read.tensors.keys()
        ).saved
        for name, target in targets.items():
            tensor = read.tensors[name]
            if target.shape == tensor.shape:  # else the comparison afterwards names it
                target.data = tensor.to(target.device)
    if extra_tensors.SECTION in plan.sections(view, manifest):
        extra_tensors.restore_adapters(manifest.sections["extra_tensors"], view)


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
