"""Faults of the file with the adapter's weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._faults.edits import (
    HEADER_AT,
    WEIGHTS,
    append,
    cut,
    data_at,
    edit_header,
    edit_tensors,
    flip,
    permissions_obeyed,
    replace_by_folder,
    replace_by_link,
    write_unknown_dtype,
    zero,
)
from benchmarks._faults.fault import Fault
from benchmarks._faults.scene import Case, block, save_as_pickle
from peftstate.errors import IntegrityError

BIN = "adapter_model.bin"

Tensors = dict[str, Any]


def _weights(change: Callable[[Path], object]) -> Callable[[Case], object]:
    """A change of the weights file."""
    return lambda case: change(case.folder / WEIGHTS)


def _tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Case], object]:
    """A change of the tensors in the weights file."""
    return _weights(lambda file: edit_tensors(file, change))


def _renamed(tensors: Tensors) -> Tensors:
    """The first tensor under another name."""
    first = min(tensors)
    return {f"{name}x" if name == first else name: value for name, value in tensors.items()}


def _swapped(tensors: Tensors) -> Tensors:
    """The tensors of q and v exchanged."""
    other = {"q_proj": "v_proj", "v_proj": "q_proj"}
    return {
        name: tensors[name.replace(part, other[part])]
        for name in tensors
        for part in other
        if part in name
    }


def _with_nan(tensors: Tensors) -> Tensors:
    """One value of the last tensor is no number."""
    tensors[max(tensors)].view(-1)[0] = float("nan")
    return tensors


def _one_ulp(tensors: Tensors) -> Tensors:
    """One value of the first tensor is the next that fp32 can hold."""
    first = tensors[min(tensors)].view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(1e9))
    return tensors


def _other_bin(case: Case) -> None:
    """The weights are gone, and another adapter's are there as a pickle."""
    (case.folder / WEIGHTS).unlink()
    tensors = _load(case.saved.other / WEIGHTS)
    torch.save(tensors, case.folder / BIN)


def _in_pickle(change: Callable[[Case], object]) -> Callable[[Case], object]:
    """A change of an adapter that was saved as a pickle, as PEFT does on request."""

    def inject(case: Case) -> None:
        save_as_pickle(case)
        change(case)

    return inject


def _weights_of(name: str) -> Callable[[Case], object]:
    """Weights of another save beside the pickle, which PEFT prefers to it."""
    return lambda case: shutil.copy(case.saved.other / name, case.folder / WEIGHTS)


def _pickled(file: Path, value: Any) -> None:
    """Another pickle of the same size, or nearly."""
    size = file.stat().st_size
    torch.save(value, file)
    append(file, b"\0" * max(0, size - file.stat().st_size))


class _Code:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code in a pickle was run')",)


def _load(file: Path) -> Tensors:
    """The tensors of a file."""
    import safetensors.torch

    tensors: Tensors = safetensors.torch.load(file.read_bytes())
    return tensors


def _huge_shape(header: dict[str, Any]) -> None:
    """A tensor that would not fit into any memory."""
    header[min(header)]["shape"] = [2**40, 2**20]


def _unreadable(case: Case) -> None:
    """The process may not read the file."""
    (case.folder / WEIGHTS).chmod(0)
    case.loading = permissions_obeyed


def _pickle_in_its_place(file: Path) -> None:
    """A pickle under the name of a safetensors file."""
    torch.save(_load(file), file)


_TENSOR = f"{WEIGHTS}[base_model.model."


def _named(key: str, what: str, inject: Callable[[Case], object], names: str = WEIGHTS) -> Fault:
    """A fault of the weights, all of which are told in one way."""
    return Fault(key=key, what=what, inject=inject, error=IntegrityError, names=names)


FAULTS = (
    _named("w01", "bit flip in tensor data", _weights(lambda file: flip(file, -1998, 2)), _TENSOR),
    _named("w02", "bit flip in a tensor's name", _weights(lambda file: flip(file, 60))),
    _named("w03", "truncated by 1 byte", _weights(lambda file: cut(file, lambda size: size - 1))),
    _named("w04", "truncated to half", _weights(lambda file: cut(file, lambda size: size // 2))),
    _named("w05", "empty file", _weights(lambda file: cut(file, lambda _: 0))),
    _named("w06", "bytes appended", _weights(lambda file: append(file, b"trailing"))),
    _named(
        "w07",
        "2 KiB zeroed (a lost page)",
        _weights(lambda file: zero(file, data_at(file) + 1024, 2048)),
        _TENSOR,
    ),
    _named(
        "w08",
        "weights of another adapter",
        lambda case: shutil.copy(case.saved.other / WEIGHTS, case.folder / WEIGHTS),
        _TENSOR,
    ),
    _named(
        "w09",
        "a tensor dropped",
        _tensors(lambda tensors: {name: tensors[name] for name in sorted(tensors)[1:]}),
    ),
    _named("w10", "a tensor renamed", _tensors(_renamed)),
    _named(
        "w11",
        "an unknown tensor more",
        _tensors(lambda tensors: {**tensors, "unknown": torch.zeros(3)}),
    ),
    _named(
        "w12",
        "cast from fp32 to bf16",
        _tensors(lambda tensors: {name: value.bfloat16() for name, value in tensors.items()}),
    ),
    _named("w13", "NaN in a tensor", _tensors(_with_nan), _TENSOR),
    _named("w14", "tensors of q and v swapped", _tensors(_swapped), _TENSOR),
    _named(
        "w15",
        "a link to other weights",
        lambda case: replace_by_link(case.folder / WEIGHTS, case.saved.other / WEIGHTS),
    ),
    _named("w16", "weights gone, another adapter's `.bin` there", _other_bin),
    _named("w17", "weights missing", _weights(Path.unlink)),
    _named("w18", "one value off by the last bit", _tensors(_one_ulp), _TENSOR),
    _named(
        "w19",
        "written anew, the tensors in another dtype of the same size",
        _weights(
            lambda file: edit_header(
                file, lambda header: [header[n].update(dtype="I32") for n in header if "lora" in n]
            )
        ),
    ),
    _named("w20", "a dtype that torch does not know", _weights(write_unknown_dtype)),
    _named("w21", "a shape beyond any memory", _weights(lambda f: edit_header(f, _huge_shape))),
    _named(
        "w22",
        "the header's length overwritten",
        _weights(lambda file: flip(file, HEADER_AT - 1, 6)),
    ),
    _named("w23", "a folder in its place", _weights(replace_by_folder)),
    _named("w24", "a named pipe in its place", lambda case: block(case, WEIGHTS)),
    _named(
        "w25",
        "a link to a device",
        _weights(lambda file: replace_by_link(file, Path("/dev/zero"))),
    ),
    _named("w26", "a link to itself", _weights(lambda file: replace_by_link(file, file))),
    _named("w27", "not readable for this process", _unreadable),
    _named("w28", "a pickle in its place", _weights(_pickle_in_its_place)),
    _named(
        "w29",
        "a Git LFS pointer in its place",
        _weights(
            lambda file: file.write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
            )
        ),
    ),
    _named(
        "w30",
        "a matrix transposed",
        _tensors(lambda t: {name: v.T if name == min(t) else v for name, v in t.items()}),
    ),
    Fault(
        key="w31",
        what="another adapter's `.bin` beside it",
        inject=lambda case: torch.save(_load(case.saved.other / WEIGHTS), case.folder / BIN),
        names=BIN,
    ),
    Fault(
        key="w32",
        what="saved as `.bin`; another adapter's `.safetensors` beside it",
        inject=_in_pickle(_weights_of(WEIGHTS)),
        names=WEIGHTS,
    ),
    Fault(
        key="w33",
        what="saved as `.bin`; a `.safetensors` of other shapes beside it",
        inject=_in_pickle(_weights_of(f"extra/{WEIGHTS}")),
        names=WEIGHTS,
    ),
    _named(
        "w34", "saved as `.bin`; bit flip", _in_pickle(lambda c: flip(c.folder / BIN, 900)), BIN
    ),
    _named(
        "w35",
        "saved as `.bin`; truncated by 1 byte",
        _in_pickle(lambda case: cut(case.folder / BIN, lambda size: size - 1)),
        BIN,
    ),
    _named(
        "w36",
        "saved as `.bin`; no tensors in it",
        _in_pickle(lambda case: _pickled(case.folder / BIN, {"x": [1, 2]})),
        BIN,
    ),
    _named(
        "w37",
        "saved as `.bin`; code in it",
        _in_pickle(lambda case: _pickled(case.folder / BIN, _Code())),
        BIN,
    ),
)
