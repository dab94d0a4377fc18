"""Faults of peftstate's own files: the manifest and the sidecar."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._faults.edits import (
    HEADER_AT,
    MANIFEST,
    SIDECAR,
    append,
    cut,
    data_at,
    edit_header,
    edit_json,
    edit_tensors,
    flip,
    permissions_obeyed,
    replace,
    replace_by_folder,
    replace_by_link,
    set_json,
    write_unknown_dtype,
    zero,
)
from benchmarks._faults.fault import Fault
from benchmarks._faults.scene import Case, block
from peftstate._codec import canonical
from peftstate._digest import seal_digest
from peftstate.errors import (
    IntegrityError,
    ManifestDecodeError,
    PeftStateError,
    RestoreError,
    SchemaVersionError,
)


def _manifest(change: Callable[[Path], object]) -> Callable[[Case], object]:
    """A change of the manifest."""
    return lambda case: change(case.folder / MANIFEST)


def _sidecar(change: Callable[[Path], object]) -> Callable[[Case], object]:
    """A change of the sidecar."""
    return lambda case: change(case.folder / SIDECAR)


def _sealed(change: Callable[[dict[str, Any]], object]) -> Callable[[Case], object]:
    """A change of the manifest by somebody who knows how to seal it again."""

    def edit(file: Path) -> None:
        content = json.loads(file.read_bytes())
        del content["digest"]
        change(content)
        text = json.dumps({**content, "digest": seal_digest(canonical(content))})
        file.write_text(text, encoding="utf-8")

    return _manifest(edit)


def _of_later(*names: str) -> Callable[[Case], object]:
    """Files of a later save of the same adapter, among those of this one."""

    def copy(case: Case) -> None:
        for name in names:
            shutil.copy(case.saved.later / name, case.folder / name)

    return copy


def _of_other(name: str) -> Callable[[Case], object]:
    """A file of another adapter's save."""
    return lambda case: shutil.copy(case.saved.other / name, case.folder / name)


def _unreadable(name: str) -> Callable[[Case], object]:
    """The process may not read the file."""

    def inject(case: Case) -> None:
        (case.folder / name).chmod(0)
        case.loading = permissions_obeyed

    return inject


def _state(content: dict[str, Any]) -> dict[str, Any]:
    """The record of Python's generator."""
    state: dict[str, Any] = content["sections"]["rng"]["python"]
    return state


def _pickle(file: Path) -> None:
    """The generators as the Trainer saves them."""
    torch.save({"cpu": torch.get_rng_state()}, file)


def _other_digit(file: Path) -> None:
    """One hexadecimal digit of the first digest is another one."""
    data = file.read_bytes()
    at = data.index(b'"digest": "') + len(b'"digest": "')
    flip(file, at)


def _without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    """The tensors without one."""
    return {key: value for key, value in tensors.items() if key != name}


def _swap_states(header: dict[str, Any]) -> None:
    """Have Python's generator and the prediction's logits trade places in the data."""
    first, second = sorted(name for name in header if name != "__metadata__")[:2]
    header[first], header[second] = header[second], header[first]


def _fault(
    key: str,
    what: str,
    inject: Callable[[Case], object],
    error: type[PeftStateError] = IntegrityError,
    names: str = "",
) -> Fault:
    """A fault of a file that plain PEFT does not know."""
    names = names or (SIDECAR if key.startswith("s") else MANIFEST)
    return Fault(key=key, what=what, inject=inject, error=error, names=names, is_ours=True)


FAULTS = (
    Fault(
        key="m01",
        what="manifest missing",
        inject=_manifest(Path.unlink),
        names=MANIFEST,
        is_ours=True,
        is_warned=True,
    ),
    _fault("m02", "manifest empty", _manifest(lambda f: cut(f, lambda _: 0)), ManifestDecodeError),
    _fault(
        "m03",
        "truncated by 1 byte",
        _manifest(lambda f: cut(f, lambda n: n - 2)),
        ManifestDecodeError,
    ),
    _fault(
        "m04",
        "truncated to half",
        _manifest(lambda f: cut(f, lambda n: n // 2)),
        ManifestDecodeError,
    ),
    _fault("m05", "bytes appended", _manifest(lambda f: append(f, b"{}")), ManifestDecodeError),
    _fault("m06", "a page zeroed", _manifest(lambda f: zero(f, 4096, 4096)), ManifestDecodeError),
    _fault(
        "m07",
        "bit flip in a number",
        _manifest(lambda f: replace(f, b'"r": 4', b'"r": 5')),
    ),
    _fault("m08", "a digest edited", _manifest(_other_digit)),
    _fault("m09", "the seal edited", _manifest(lambda f: set_json(f, digest="0" * 64))),
    _fault(
        "m10",
        "the seal gone",
        _manifest(lambda f: edit_json(f, lambda value: value.pop("digest"))),
        ManifestDecodeError,
        "digest",
    ),
    _fault("m11", "manifest of another adapter", _of_other(MANIFEST), names="saved "),
    _fault("m12", "manifest of a later save", _of_later(MANIFEST), names=SIDECAR),
    _fault(
        "m13",
        "manifest and sidecar of another adapter",
        lambda case: [_of_other(name)(case) for name in (MANIFEST, SIDECAR)],
        names="adapter_model.safetensors[base_model.model.",
    ),
    _fault(
        "m14",
        "a newer schema",
        _sealed(lambda value: value.update(schema_version=999)),
        SchemaVersionError,
        "999",
    ),
    _fault(
        "m15",
        "an unknown section, sealed again",
        _sealed(lambda value: value["sections"].update(new={})),
        ManifestDecodeError,
        "sections.new",
    ),
    _fault(
        "m16",
        "a section gone, sealed again",
        _sealed(lambda value: value["sections"].pop("rng")),
        ManifestDecodeError,
        "sections.rng",
    ),
    _fault(
        "m17",
        "a number as text, sealed again",
        _sealed(lambda value: _state(value).update(version="3")),
        ManifestDecodeError,
        "sections.rng.python.version",
    ),
    _fault(
        "m18",
        "an unknown field, sealed again",
        _sealed(lambda value: _state(value).update(seed=3)),
        ManifestDecodeError,
        "sections.rng.python",
    ),
    _fault(
        "m19",
        "a file outside the folder, sealed again",
        _sealed(lambda value: value["files"].update({"../x": {"size": 1, "sha256": "0"}})),
        ManifestDecodeError,
        "files[../x]",
    ),
    _fault(
        "m20",
        "a generator's version unknown, sealed again",
        _sealed(lambda value: _state(value).update(version=9)),
        RestoreError,
        "rng",
    ),
    _fault("m21", "a folder in its place", _manifest(replace_by_folder)),
    _fault("m22", "a named pipe in its place", lambda case: block(case, MANIFEST)),
    _fault("m23", "a link to nothing", _manifest(lambda f: replace_by_link(f, f.with_name("x")))),
    _fault(
        "m24",
        "a link to another adapter's",
        lambda case: replace_by_link(case.folder / MANIFEST, case.saved.other / MANIFEST),
    ),
    _fault("m25", "not readable for this process", _unreadable(MANIFEST)),
    _fault("s01", "sidecar missing", _sidecar(Path.unlink)),
    _fault("s02", "sidecar empty", _sidecar(lambda f: cut(f, lambda _: 0))),
    _fault("s03", "truncated by 1 byte", _sidecar(lambda f: cut(f, lambda n: n - 1))),
    _fault("s04", "bytes appended", _sidecar(lambda f: append(f, b"x"))),
    _fault("s05", "bit flip in data", _sidecar(lambda f: flip(f, -9)), names=f"{SIDECAR}["),
    _fault("s06", "a page zeroed", _sidecar(lambda f: zero(f, data_at(f) + 512, 4096))),
    _fault("s07", "sidecar of a later save", _of_later(SIDECAR), names=f"{SIDECAR}[rng."),
    _fault("s08", "sidecar of another adapter", _of_other(SIDECAR), names=f"{SIDECAR}["),
    _fault(
        "s09",
        "a generator's state dropped",
        _sidecar(lambda f: edit_tensors(f, lambda t: _without(t, "rng.torch_cpu"))),
    ),
    _fault(
        "s10",
        "two states swapped in the header",
        _sidecar(lambda f: edit_header(f, _swap_states)),
        names=f"{SIDECAR}[",
    ),
    _fault(
        "s11",
        "a state in another dtype",
        _sidecar(lambda f: edit_header(f, lambda h: h["rng.torch_cpu"].update(dtype="I8"))),
    ),
    _fault(
        "s12",
        "a dtype that torch does not know",
        _sidecar(write_unknown_dtype),
    ),
    _fault("s13", "header no JSON", _sidecar(lambda f: flip(f, HEADER_AT, 2))),
    _fault("s14", "a pickle in its place", _sidecar(_pickle)),
    _fault("s15", "a folder in its place", _sidecar(replace_by_folder)),
    _fault("s16", "a named pipe in its place", lambda case: block(case, SIDECAR)),
    _fault(
        "s17",
        "a link to another adapter's",
        lambda case: replace_by_link(case.folder / SIDECAR, case.saved.other / SIDECAR),
    ),
    _fault("s18", "not readable for this process", _unreadable(SIDECAR)),
)
