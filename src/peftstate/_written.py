"""What PEFT wrote into an adapter's folder, described for the manifest."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path

import attrs

from peftstate._disk import sync_file
from peftstate._safetensors import stored_digests
from peftstate._storage import ADAPTER_CONFIG_NAME, WEIGHTS_NAMES
from peftstate._weights import parse_weights
from peftstate.manifest import FileRecord
from peftstate.sections import adapters
from peftstate.sections._adapter_config import canonical_fields
from peftstate.sections._tensors import TensorRecord, tensor_records


def describe_written(
    record: adapters.AdapterRecord, folder: Path
) -> tuple[adapters.AdapterRecord, dict[str, FileRecord]]:
    """An adapter's record, by what PEFT wrote: it may convert both tensors and config."""
    weights = next(name for name in WEIGHTS_NAMES if (folder / name).exists())
    with ThreadPoolExecutor() as pool:  # the disk has time, and SHA-256 takes the longest
        synced = pool.submit(sync_file, folder / weights)
        file = pool.submit(_file_record, folder / weights)
        tensors = _written_tensors(folder / weights)
        synced.result()
    _refuse_unloadable(tensors, record.tensors)
    config = json.loads((folder / ADAPTER_CONFIG_NAME).read_bytes())
    described = attrs.evolve(
        record,
        config=canonical_fields(config),
        tensors=tensors,
        embeddings_saved=bool(tensors.keys() - record.tensors.keys()),
    )
    return described, {weights: file.result()}


def _file_record(path: Path) -> FileRecord:
    """A file as it was written."""
    with path.open("rb") as file:
        sha256 = file_digest(file, "sha256").hexdigest()
        return FileRecord(size=file.tell(), sha256=sha256)


def _written_tensors(path: Path) -> dict[str, TensorRecord]:
    """The tensors in a file of weights, read back from it."""
    if path.suffix != ".safetensors":
        return tensor_records(parse_weights(path.name, path.read_bytes()))
    with path.open("rb") as file:
        return {
            name: TensorRecord(dtype=dtype, shape=shape, digest=digest)
            for name, dtype, shape, digest in sorted(stored_digests(file))
        }


def _refuse_unloadable(tensors: Mapping[str, TensorRecord], live: Collection[str]) -> None:
    """Refuse what PEFT writes without a word and can never load again.

    Args:
        tensors: What PEFT wrote.
        live: The names of the tensors that the adapter in the model has.

    Raises:
        ValueError: The text says what to do.
    """
    for name in sorted(set(live) - tensors.keys()):
        raise ValueError(
            f"the adapter's tensor {name!r} is not in the state_dict= that was passed; its names "
            "must be those of the model itself, without what torch.compile or FSDP put before them"
        )
    for name, tensor in tensors.items():
        for mark, remedy in _WRAPPED.items():
            if mark in name:
                raise ValueError(
                    f"the adapter's tensor {name!r} bears the name of a wrapper; {remedy}"
                )
        if tensor.shape == (0,):  # AdaLoRA has empty matrices where it cut all ranks
            raise ValueError(
                f"the adapter's tensor {name!r} is empty: DeepSpeed ZeRO-3 keeps it in pieces; "
                "save within deepspeed.zero.GatheredParameters, or pass the gathered state_dict="
            )
        if len(tensor.shape) == 1 and name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(
                f"the adapter's tensor {name!r} is flat: it is a shard of FSDP's; pass the full "
                "state_dict= that FSDP gathers"
            )


_WRAPPED = {
    "_orig_mod.": "save the model that was handed to torch.compile",
    "_fsdp_wrapped_module.": "pass the full state_dict= that FSDP gathers",
    "base_model.model.base_model.model.": "the model was wrapped by get_peft_model twice; "
    "merge or unload the inner adapter first",
}
"""Parts of names that PEFT's load does not find again, and what to do about each."""
