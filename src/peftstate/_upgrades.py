"""How a manifest of an older schema becomes one of the next.

A step says of each new field what an older peftstate knew of it: nothing, or what could not be
otherwise then. It is handed what the seal covers, which need not be a manifest yet: what is missing
or of another type is left for the decoder to name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeAlias

from peftstate._codec import DecodeError
from peftstate._diff import Json

Content: TypeAlias = dict[str, Json]


def _to_2(content: Content) -> Content:
    """Add what schema 1 has no fields for."""
    _add(content, "sections.adapters", {"safe_merge": False})
    _add(content, "sections.base_model", {"files": {}, "remote_code": None})
    _add(content, "sections.extra_tensors", {"quantized": {}})
    _add(content, "sections.rng", {"process": None})
    _add(content, "sections.rng.numpy", {"generator": "MT19937"})
    _add(content, "sections.tokenizer", {"files": None})
    _add(content, "sections.training", {"inference_mode": {}})
    return content


def _to_3(content: Content) -> Content:
    """Add what schema 2 has no field for: to each part of a model the dropout, which is unknown."""
    fields: Content = {"dropout": {"default": None, "exceptions": {}}}
    training = "sections.training"
    adapters = _at(content, f"{training}.adapters")
    for part in ("base", "model"):
        _add(content, f"{training}.{part}", fields)
    for name, record in adapters.items() if isinstance(adapters, dict) else ():
        _add_to(record, f"{training}.adapters.{name}", fields)
    return content


def _at(content: Json, path: str) -> Json:
    """What is at a path; `None` if there is nothing."""
    for name in path.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _add(content: Content, path: str, fields: Mapping[str, Json]) -> None:
    """Add fields to the object at a path, if there is one."""
    _add_to(_at(content, path), path, fields)


def _add_to(item: Json, path: str, fields: Mapping[str, Json]) -> None:
    """Add fields to what is at a path, if it is an object.

    Raises:
        DecodeError: One is there already, where the older schema knows none.
    """
    if not isinstance(item, dict):
        return
    for key in fields.keys() & item.keys():
        raise DecodeError(f"unknown key {key!r}", field=path)
    item.update(copy.deepcopy(dict(fields)))


UPGRADES: dict[int, Callable[[Content], Content]] = {1: _to_2, 2: _to_3}
"""The steps, by the schema version that each starts from; each may change what it is handed."""
