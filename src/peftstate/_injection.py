"""Between what was read and PEFT: what it is handed to load, and what is set afterwards."""

from __future__ import annotations

import ast
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, save_and_load
from torch import nn

from peftstate._codec import dumps
from peftstate._storage import ADAPTER_CONFIG_NAME
from peftstate.errors import AdapterLoadError, RestoreError
from peftstate.sections import extra_tensors
from peftstate.sections._adapter_tensors import adapter_tensors, live_tensors
from peftstate.sections._tensors import tensor_record

if TYPE_CHECKING:
    from peftstate._source import AdapterFiles, Source
    from peftstate._steps import Plan
    from peftstate.manifest import Manifest
    from peftstate.sections._view import ModelView
    from peftstate.sections._walk import TensorSite
    from peftstate.sections.adapters import AdapterRecord


def set_tensors(
    view: ModelView, files: Mapping[str, AdapterFiles], manifest: Manifest, plan: Plan
) -> None:
    """Set the adapters' live tensors from the bytes that were read, in their saved dtypes.

    PEFT has loaded the same file, but into tensors of the dtype it chose, which rounds. Of tensors
    that PEFT computes when it saves (a prompt's embedding), what they are computed from is set, for
    which the sidecar is read. All that comes before an adapter is merged into the base model.
    A tensor that is right already stays as it is, for it may share its memory with another one.

    Raises:
        AdapterLoadError: A weight has no place, or a placeholder no weight.
    """
    view = view.once()
    for saved, read in files.items():
        _set_adapter(view, saved, read, manifest.sections["adapters"].adapters[saved])
    if extra_tensors.SECTION in plan.sections(view, manifest):
        extra_tensors.restore_adapters(manifest.sections["extra_tensors"], view)


def _set_adapter(view: ModelView, saved: str, read: AdapterFiles, record: AdapterRecord) -> None:
    """Set the tensors of one adapter.

    Placeholders on the meta device are put on that of the base model, which is on one only.
    """
    targets = adapter_tensors(
        view, saved, embeddings=record.embeddings_saved, names=read.tensors.keys()
    ).saved
    sites = (site for site in view.tensors() if site.adapter == view.adapters[saved])
    waiting = {id(site.tensor): site for site in sites if site.tensor.is_meta}
    fitting = {
        name: target for name, target in targets.items() if target.shape == read.tensors[name].shape
    }
    placed = [(waiting.pop(id(t)), read.tensors[n]) for n, t in fitting.items() if id(t) in waiting]
    if placed:
        _put_all(placed, next((t.device for t in view.base.parameters()), torch.device("cpu")))
        view.tensors_changed()
    for name, target in fitting.items():
        if not target.is_meta and tensor_record(target) != record.tensors[name]:
            _set(target, read.tensors[name])
    for site in waiting.values():
        own = read.tensors.get(site.name)
        trouble = "no weights" if own is None else "size mismatch"  # as torch says it
        has = "has none" if own is None else f"has one of shape {list(own.shape)}"
        raise AdapterLoadError(
            "adapters",
            f"{trouble} for {site.name}: the model takes a tensor of shape "
            f"{list(site.tensor.shape)}, the adapter {has}; the base model is another one",
        )


def _set(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Give a tensor other values, and their dtype, in memory of its own.

    The layout, which the last bits of a product depend on, is kept: where LoRA ties the adapters of
    tied embeddings, one tensor is another one transposed
    (`peft/tuners/lora/model.py::LoraModel._create_and_replace`).
    """
    target.data = torch.empty_like(target, dtype=tensor.dtype).copy_(tensor)


def _put_all(placed: Sequence[tuple[TensorSite, torch.Tensor]], device: torch.device) -> None:
    """Put tensors in the places of some on the meta device."""
    for site, tensor in placed:
        parameter = nn.Parameter(tensor.to(device), site.tensor.requires_grad)
        site.module._parameters[site.leaf] = parameter


@contextmanager
def readable_by_peft(source: Source, name: str) -> Iterator[Path]:
    """A folder from which PEFT gets an adapter as it was read and checked, and nothing else.

    In the adapter's own folder there may be other files by now, and PEFT writes whatever tensor of
    the base model is in a weights file into that model. So it gets a folder with the config, and
    the weights from memory. Only one load at a time may do this.

    Raises:
        RestoreError: There is no place for a temporary folder.
    """
    files = source.adapters[name]
    with temporary_folder() as folder:
        (folder / ADAPTER_CONFIG_NAME).write_bytes(dumps(files.config))
        with _handed_over(folder / SAFETENSORS_WEIGHTS_NAME, files.tensors):
            yield folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder; where the disk is read-only, as in a container, in shared memory."""
    with ExitStack() as stack:
        reason: OSError | None = None
        for place in (None, "/dev/shm"):  # noqa: S108 - the folder in it has a name of its own
            try:
                folder = tempfile.TemporaryDirectory(prefix="peftstate-", dir=place)
            except OSError as error:
                reason = reason or error
            else:
                yield Path(stack.enter_context(folder))
                return
        raise RestoreError("adapters", f"no temporary folder can be made ({reason})") from reason


@contextmanager
def _handed_over(file: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have PEFT find tensors in a weights file that are in memory."""
    module: Any = save_and_load
    read = getattr(module, "safe_load_file", None)
    if read is None:  # every PEFT so far has it
        safetensors.torch.save_file(dict(tensors), file, {"format": "pt"})
        yield
        return

    def read_or_take(name: str | os.PathLike[str], device: Any = "cpu", **options: Any) -> Any:
        if Path(name) != file:
            return read(name, device, **options)
        return {key: tensor.to(device) for key, tensor in tensors.items()}

    file.touch()
    try:
        module.safe_load_file = read_or_take
        yield
    finally:
        module.safe_load_file = read


@contextmanager
def without_word_of(names: Collection[str], adapter: str) -> Iterator[None]:
    """Keep PEFT from warning that tensors are not in its file, where these are in the sidecar.

    Args:
        names: The names of the adapter's tensors in the sidecar.
        adapter: The adapter's name in the model, which is part of the names in PEFT's warning.
    """
    if not names:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for item in caught:
        missing = {_without(key, adapter) for key in _missing_keys(str(item.message))}
        if not missing or missing - set(names):
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def _missing_keys(message: str) -> list[str]:
    """The keys that PEFT's warning names (`peft/peft_model.py::PeftModel.from_pretrained`)."""
    found = re.search(r"Found missing adapter keys while loading the checkpoint: (\[.*\])", message)
    return list(ast.literal_eval(found[1])) if found else []


def _without(key: str, adapter: str) -> str:
    """The name of a tensor without the adapter's own name, which is the last part that is so."""
    before, found, after = f".{key}.".rpartition(f".{adapter}.")
    return f"{before}.{after}".strip(".") if found else key


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
