"""What a hostile folder is, and the tools to make one of a good one.

Whoever writes a manifest can seal it, so nearly all of these have the right seal and the right
digests: what refuses them must be what is said in them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch
import torch

from peftstate._codec import canonical, dumps
from peftstate._digest import seal_digest
from peftstate.sections._tensors import digest, dtype_name

MANIFEST = "peftstate.json"
SIDECAR = "peftstate.tensors"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

Edit = Callable[[dict[str, Any]], object]
"""Changes the JSON of a manifest, or of a PEFT config, in place."""
Make = Callable[[Path], object]
"""Makes a good folder hostile."""


@attrs.frozen(kw_only=True)
class Case:
    """A hostile folder.

    Attributes:
        name: Its name, unique among all.
        attacks: What it is after.
        make: Makes it.
        error: The class of the error that a load must raise; `None` if it loads, harmlessly.
        tells: What the error's text must have in it: the file or the field.
        by_auto: Whether it is loaded by an auto class, base model and all.
    """

    name: str
    attacks: str
    make: Make
    error: type[Exception] | None
    tells: str = ""
    by_auto: bool = False


def manifest_of(folder: Path) -> dict[str, Any]:
    """The JSON of a folder's manifest."""
    value: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return value


def sealed(value: Mapping[str, Any]) -> bytes:
    """A manifest with the right seal."""
    content = {key: item for key, item in value.items() if key != "digest"}
    return dumps({**content, "digest": seal_digest(canonical(content))})


def raw(data: bytes | Callable[[], bytes]) -> Make:
    """The bytes of a manifest."""
    return lambda folder: (folder / MANIFEST).write_bytes(data() if callable(data) else data)


def text(edit: Callable[[str], str]) -> Make:
    """A manifest whose text is edited; its seal is that of before."""

    def make(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(edit(path.read_text("utf-8")), "utf-8", errors="surrogatepass")

    return make


def edited(edit: Edit, *, seal: bool = True) -> Make:
    """A manifest that is edited, and sealed again."""

    def make(folder: Path) -> None:
        value = manifest_of(folder)
        edit(value)
        (folder / MANIFEST).write_bytes(sealed(value) if seal else dumps(value))

    return make


def section(name: str, edit: Edit) -> Make:
    """A section of a manifest that is edited."""
    return edited(lambda value: edit(value["sections"][name]))


def with_file(name: str, change: Callable[[bytes], bytes]) -> Make:
    """A file that is changed, and recorded as it is now."""

    def make(folder: Path) -> None:
        data = change((folder / name).read_bytes())
        (folder / name).write_bytes(data)
        value = manifest_of(folder)
        value["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / MANIFEST).write_bytes(sealed(value))

    return make


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    """A tensor of the sidecar that is another one, recorded with its right digest everywhere."""

    def make(folder: Path) -> None:
        tensors = safetensors.torch.load((folder / SIDECAR).read_bytes())
        tensor = tensors[name] = change(tensors[name])
        data = safetensors.torch.save(tensors)
        (folder / SIDECAR).write_bytes(data)
        value = manifest_of(folder)
        value["files"][SIDECAR] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for record in tensor_records(value["sections"], name):
            record["dtype"], record["shape"] = dtype_name(tensor.dtype), list(tensor.shape)
            record["digest"] = digest(tensor)
        (folder / MANIFEST).write_bytes(sealed(value))

    return make


def tensor_records(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """The records of a tensor of the sidecar."""
    if isinstance(value, dict) and value.get("tensor") == name:
        yield value
    for inner in value.values() if isinstance(value, dict) else ():
        yield from tensor_records(inner, name)


def with_config(edit: Edit) -> Make:
    """The PEFT config edited, on disk and in the manifest."""

    def make(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_bytes())
        edit(config)
        (folder / CONFIG).write_text(json.dumps(config))

        value = manifest_of(folder)
        record = value["sections"]["adapters"]["adapters"]["default"]["config"]
        before = copy.deepcopy(record)
        edit(record)
        for key in record.keys() & _NOT_RECORDED - before.keys():
            del record[key]
        (folder / MANIFEST).write_bytes(sealed(value))

    return make


_NOT_RECORDED = {"auto_mapping", "base_model_name_or_path", "revision", "runtime_config"}


def both(*makes: Make) -> Make:
    """Several changes of one folder."""

    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


def header(length: int | None, content: bytes | Any, data: bytes = b"") -> bytes:
    """A safetensors file, of which nothing need be right.

    Args:
        length: What it says of the length of its header; `None` for the truth.
        content: The header, as bytes or as JSON.
        data: What follows.
    """
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    size = len(content) if length is None else length
    return size.to_bytes(8, "little") + content + data
