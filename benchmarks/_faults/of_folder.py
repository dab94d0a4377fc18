"""Faults of the folder around the adapter, and of the extra adapter's folder in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch

from benchmarks._faults.edits import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    append,
    flip,
    permissions_obeyed,
    replace_by_link,
    set_json,
)
from benchmarks._faults.fault import Fault
from benchmarks._faults.scene import Case
from peftstate.errors import AdapterMismatchError, IntegrityError, PeftStateError

EXTRA = "extra"
FOREIGN = ("optimizer.pt", "training_args.bin", "rng_state.pth")


def _add(name: str, data: bytes = b"hello") -> Callable[[Case], object]:
    """A file more."""
    return lambda case: (case.folder / name).write_bytes(data)


def _base_weights(case: Case) -> None:
    """The base model beside the adapter, as TGI writes it there."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(case.saved.checkpoint / name, case.folder / name)


def _trainers_files(case: Case) -> None:
    """What a Trainer keeps beside an adapter."""
    for name in FOREIGN:
        torch.save({}, case.folder / name)


def _closed(case: Case) -> None:
    """The process may not look into the folder."""
    case.folder.chmod(0)
    case.loading = permissions_obeyed


def _extra_closed(case: Case) -> None:
    """The process may not look into the folder of the extra adapter."""
    (case.folder / EXTRA).chmod(0)
    case.loading = permissions_obeyed


def _extra_is_a_file(case: Case) -> None:
    """A file where the folder of the extra adapter was."""
    shutil.rmtree(case.folder / EXTRA)
    (case.folder / EXTRA).write_text("no folder")


def _extra_is_a_link(case: Case) -> None:
    """A link to another save's folder where that of the extra adapter was."""
    shutil.rmtree(case.folder / EXTRA)
    (case.folder / EXTRA).symlink_to(case.saved.other / EXTRA)


def _extra_of_other(case: Case) -> None:
    """The extra adapter of another save."""
    shutil.rmtree(case.folder / EXTRA)
    shutil.copytree(case.saved.other / EXTRA, case.folder / EXTRA)


def _unreadable_extra(case: Case) -> None:
    """The process may not read the extra adapter's weights."""
    (case.folder / EXTRA / WEIGHTS).chmod(0)
    case.loading = permissions_obeyed


def _mentioned(key: str, what: str, inject: Callable[[Case], object], names: str) -> Fault:
    """What the load does not depend on, but `verify_files` mentions."""
    return Fault(key=key, what=what, inject=inject, names=names)


def _extra(
    key: str,
    what: str,
    inject: Callable[[Case], object],
    error: type[PeftStateError] = IntegrityError,
    names: str = f"{EXTRA}/{WEIGHTS}",
) -> Fault:
    """A fault of the extra adapter, which plain PEFT does not load."""
    return Fault(key=key, what=what, inject=inject, error=error, names=names, is_ours=True)


FAULTS = (
    _mentioned("d01", "a file more in the folder", _add("notes.txt"), "notes.txt"),
    _mentioned(
        "d02",
        "README changed",
        lambda case: append(case.folder / "README.md", b"hello"),
        "README.md",
    ),
    _mentioned("d03", "the base model beside the adapter", _base_weights, "model.safetensors"),
    _mentioned("d04", "a Trainer's files beside the adapter", _trainers_files, "optimizer.pt"),
    _mentioned(
        "d05",
        "a shard of a base model beside the adapter",
        _add("model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors",
    ),
    Fault(
        key="d06",
        what="the folder closed to this process",
        inject=_closed,
        error=IntegrityError,
        names=MANIFEST,
    ),
    _extra("x01", "bit flip in the extra adapter", lambda c: flip(c.folder / EXTRA / WEIGHTS, -9)),
    _extra(
        "x02",
        "`lora_alpha` of the extra adapter",
        lambda case: set_json(case.folder / EXTRA / CONFIG, lora_alpha=64),
        AdapterMismatchError,
        "lora_alpha",
    ),
    _extra("x03", "its folder missing", lambda case: shutil.rmtree(case.folder / EXTRA)),
    _extra("x04", "a file in its folder's place", _extra_is_a_file),
    _extra("x05", "a link in its folder's place", _extra_is_a_link),
    _extra("x06", "the extra adapter of another save", _extra_of_other),
    _extra("x07", "its weights missing", lambda c: (c.folder / EXTRA / WEIGHTS).unlink()),
    _extra(
        "x08",
        "its config missing",
        lambda case: (case.folder / EXTRA / CONFIG).unlink(),
        names=f"{EXTRA}/{CONFIG}",
    ),
    _extra("x09", "its weights not readable", _unreadable_extra),
    _extra("x10", "its folder closed to this process", _extra_closed),
    _extra(
        "x11",
        "the first adapter's weights in its place",
        lambda case: shutil.copy(case.folder / WEIGHTS, case.folder / EXTRA / WEIGHTS),
    ),
    _extra(
        "x12",
        "a link out of the folder for its weights",
        lambda c: replace_by_link(c.folder / EXTRA / WEIGHTS, c.saved.other / EXTRA / WEIGHTS),
    ),
)
