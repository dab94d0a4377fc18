"""Settings: which code runs, which adapters are applied and how strongly, the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import attrs

from peftstate._diagnosing.pair import Difference, Pair, alike, put
from peftstate._diff import Json, diff, shown, steps
from peftstate.sections import adapters, implementation
from peftstate.sections._model_config import config_fields
from peftstate.sections._table import Table
from peftstate.sections._view import ModelView
from peftstate.sections._walk import TensorSite
from peftstate.sections.adapters import AdaptersRecord

_ADAPTERS_REMEDY = "Load with peftstate, which restores it."
_FUNCTIONS = (
    ("attention", "attention", "attn_implementation"),
    ("experts", "experts", "experts_implementation"),
)


def functions(pair: Pair) -> Iterator[Difference]:
    """The implementations of attention and of experts."""
    saved, found = (implementation.capture(view) for view in (pair.exact, pair.users))
    for name, field, argument in _FUNCTIONS:
        one, other = getattr(saved, field), getattr(found, field)
        if one == other:
            continue
        record = attrs.evolve(saved, **{field: other})
        yield Difference(
            name=name,
            section="implementation",
            saved=_joined(one),
            found=_joined(other),
            remedy=f"Load the base model with {argument}= as it was: base_model_kwargs(adapter), "
            "or `peftstate base-args`.",
            give=partial(implementation.restore, record, pair.exact),
        )


def _joined(values: Mapping[str, str]) -> str:
    """The implementations of a model and of its parts, each once."""
    return ", ".join(sorted(set(values.values()))) or "eager"


def applied(pair: Pair) -> Iterator[Difference]:
    """Which adapters are applied, and by what factor."""
    record = pair.manifest.sections["adapters"]
    saved, found = (adapters.capture_like(view, record) for view in (pair.exact, pair.users))
    if saved.active != found.active:
        yield _setting(
            "active adapters",
            pair,
            attrs.evolve(saved, active=found.active),
            ", ".join(saved.active or ()) or "none",
            ", ".join(found.active or ()) or "none",
        )
    if saved.enabled != found.enabled:
        words = {True: "applied", False: "disabled"}
        yield _setting(
            "adapters applied",
            pair,
            attrs.evolve(saved, enabled=found.enabled),
            words[saved.enabled],
            words[found.enabled],
        )
    factors = [
        (saved.adapters[name].scaling, found.adapters[name].scaling)
        for name in saved.adapters.keys() & found.adapters.keys()
    ]
    if differing := [(one, other) for one, other in factors if one != other]:
        one, other = (_factor(table) for table in differing[0])
        scaled = {name: found.adapters.get(name, saved.adapters[name]) for name in saved.adapters}
        yield _setting("scaling", pair, attrs.evolve(saved, adapters=scaled), one, other)


def _factor(table: Table[float]) -> str:
    """The usual factor, and how many layers have another one."""
    others = f", {len(table.exceptions)} otherwise" if table.exceptions else ""
    return f"{table.default}{others}"


def _setting(name: str, pair: Pair, record: AdaptersRecord, saved: str, found: str) -> Difference:
    """A setting of the adapters that is given by restoring a record."""
    return Difference(
        name=name,
        section="adapters",
        saved=saved,
        found=found,
        remedy=_ADAPTERS_REMEDY,
        give=partial(adapters.restore, record, pair.exact),
    )


def config(pair: Pair) -> Iterator[Difference]:
    """The config of the base model, and the buffers that are computed from it.

    Only what is read when the model runs can be given; of what it was built from, the rest tells.
    """
    saved, found = (
        config_fields(getattr(v.base, "config", None)) for v in (pair.exact, pair.users)
    )
    fields = diff("base_model", saved, found)
    buffers = _other_buffers(pair)
    if not fields and not buffers:
        return

    def give() -> None:
        _copy_fields(saved, found, pair.exact.base.config, pair.users.base.config)
        sites = _computed(pair.exact)
        for name in buffers:
            put(sites[name], pair.theirs["base", None, name])

    first = fields[0] if fields else None
    yield Difference(
        name="base config",
        section="base_model",
        saved=f"{first.field} {shown(first.saved)}" if first else min(buffers),
        found=f"{first.field} {shown(first.found)}" if first else "other values",
        remedy="Load the base model with the config that it had; peftstate's auto classes do.",
        give=give,
    )


def _computed(view: ModelView) -> dict[str, TensorSite]:
    """The buffers of the base model that no checkpoint holds, such as rotary frequencies."""
    return {
        site.name: site
        for site in view.tensors()
        if site.part == "base" and not site.persistent and site.tensor.is_floating_point()
    }


def _other_buffers(pair: Pair) -> list[str]:
    """Names of the buffers whose values differ."""
    return sorted(
        name
        for name, site in _computed(pair.exact).items()
        if (found := pair.theirs.get(("base", None, name))) is not None
        if not alike(site.tensor, found)
    )


def _copy_fields(
    saved: Mapping[str, Json], found: Mapping[str, Json], ours: Any, theirs: Any
) -> None:
    """Set the fields of a config, and of the configs in it, that differ."""
    for name in {steps(each.field)[0] for each in diff("base_model", saved, found)}:
        if name in getattr(ours, "sub_configs", {}):
            _copy_fields(saved[name], found[name], getattr(ours, name), getattr(theirs, name))
        elif hasattr(theirs, name):
            setattr(ours, name, getattr(theirs, name))
