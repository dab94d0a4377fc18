"""Faults of the adapter's PEFT config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._faults.edits import (
    CONFIG,
    append,
    cut,
    edit_json,
    permissions_obeyed,
    replace,
    replace_by_folder,
    replace_by_link,
    set_json,
)
from benchmarks._faults.fault import Fault
from benchmarks._faults.scene import Case, block
from peftstate.errors import AdapterMismatchError, IntegrityError

DEPTH = 100_000
"""Levels of nesting that no parser of Python's stands."""


def _config(change: Callable[[Path], object]) -> Callable[[Case], object]:
    """A change of the config file."""
    return lambda case: change(case.folder / CONFIG)


def _set(**fields: Any) -> Callable[[Case], object]:
    """Other values of some fields."""
    return _config(lambda file: set_json(file, **fields))


def _flip(field: str) -> Callable[[Case], object]:
    """A switch turned over."""
    return _config(
        lambda file: edit_json(file, lambda value: value.update({field: not value[field]}))
    )


def _duplicate_key(file: Path) -> None:
    """A key twice, of which Python's parser takes the second."""
    replace(file, b'"lora_alpha": 8,', b'"lora_alpha": 8, "lora_alpha": 80,')


def _nested(file: Path) -> None:
    """A value that no parser can descend into."""
    deep = b'{"a":' * DEPTH + b"1" + b"}" * DEPTH
    replace(file, b"{", b'{"deep": ' + deep + b",")


def _digits(file: Path) -> None:
    """A number that Python refuses to convert."""
    replace(file, b": 8,", b": " + b"8" * 5000 + b",")


def _unreadable(case: Case) -> None:
    """The process may not read the file."""
    (case.folder / CONFIG).chmod(0)
    case.loading = permissions_obeyed


def _field(key: str, what: str, inject: Callable[[Case], object], field: str) -> Fault:
    """A field that differs."""
    return Fault(
        key=key,
        what=what,
        inject=inject,
        error=AdapterMismatchError,
        names=f"adapters.default.config.{field}",
    )


def _damaged(key: str, what: str, inject: Callable[[Case], object]) -> Fault:
    """A file that is no config."""
    return Fault(key=key, what=what, inject=inject, error=IntegrityError, names=CONFIG)


FAULTS = (
    _field("c01", "`lora_alpha` 8 → 64", _set(lora_alpha=64), "lora_alpha: saved 8, found 64"),
    _field("c02", "`use_rslora` flipped", _flip("use_rslora"), "use_rslora"),
    _field("c03", "`r` changed", _set(r=8), "r: saved 4, found 8"),
    _field(
        "c04", "`target_modules` lost one", _set(target_modules=["q_proj"]), "target_modules[v_proj"
    ),
    _field(
        "c05",
        "`target_modules` gained one",
        _set(target_modules=["q_proj", "v_proj", "o_proj"]),
        "target_modules[o_proj]",
    ),
    _field("c06", "`alpha_pattern` added", _set(alpha_pattern={"q_proj": 64}), "alpha_pattern"),
    _field("c07", "`fan_in_fan_out` flipped", _flip("fan_in_fan_out"), "fan_in_fan_out"),
    Fault(
        key="c08",
        what="name of the base model changed",
        inject=_set(base_model_name_or_path="somewhere/else"),
    ),
    _damaged("c09", "JSON truncated", _config(lambda file: cut(file, lambda size: size // 2))),
    _damaged("c10", "config missing", _config(Path.unlink)),
    _damaged("c11", "key `lora_alpha` twice", _config(_duplicate_key)),
    _damaged("c12", f"JSON nested {DEPTH} deep", _config(_nested)),
    _field("c13", "`lora_dropout` 0.1 → 0.9", _set(lora_dropout=0.9), "lora_dropout"),
    _field("c14", "an unknown key added", _set(unknown_key=1), "unknown_key"),
    Fault(key="c15", what="`peft_version` 99.0", inject=_set(peft_version="99.0")),
    _field("c16", "`bias` none → all", _set(bias="all"), "bias: saved 'none', found 'all'"),
    _field("c17", "`peft_type` of another method", _set(peft_type="IA3"), "peft_type"),
    _field("c18", "`peft_type` unknown", _set(peft_type="NO_SUCH"), "peft_type"),
    _field("c19", "`task_type` changed", _set(task_type="SEQ_CLS"), "task_type"),
    _field("c20", "`r` as text", _set(r="4"), "r: saved 4, found '4'"),
    _field("c21", "`r` as a number with a point", _set(r=4.0), "r: saved 4, found 4.0"),
    _field("c22", "`modules_to_save` added", _set(modules_to_save=["lm_head"]), "modules_to_save"),
    _field("c23", "`layers_to_transform` set", _set(layers_to_transform=[0]), "layers_to_transf"),
    _field(
        "c24",
        "`use_dora` gone",
        _config(lambda file: edit_json(file, lambda value: value.pop("use_dora"))),
        "use_dora",
    ),
    _damaged("c25", "empty file", _config(lambda file: cut(file, lambda _: 0))),
    _damaged("c26", "no object but a list", _config(lambda file: file.write_text("[1, 2]"))),
    _damaged("c27", "NaN for a number", _config(lambda f: replace(f, b": 8,", b": NaN,"))),
    _damaged("c28", "no UTF-8", _config(lambda file: replace(file, b"q_proj", b"\xff\xfe"))),
    _damaged("c29", "text after the end", _config(lambda file: append(file, b"\n}"))),
    _damaged("c30", "an integer of 5,000 digits", _config(_digits)),
    _field("c35", "`target_modules` no names", _set(target_modules=[{}, 1]), "target_modules"),
    _damaged("c31", "a folder in its place", _config(replace_by_folder)),
    _damaged("c32", "a named pipe in its place", lambda case: block(case, CONFIG)),
    _damaged(
        "c33",
        "a link to another adapter's config",
        lambda case: replace_by_link(case.folder / CONFIG, case.saved.other / CONFIG),
    ),
    _damaged("c34", "not readable for this process", _unreadable),
)
