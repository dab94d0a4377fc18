"""`dtype`: in which dtype every parameter and buffer is.

PEFT casts a bf16 adapter to fp32 when it loads one, transformers changed the dtype that it loads
a model in, and `prepare_model_for_kbit_training` casts what is not quantized to fp32 for good.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, TypeAlias

import attrs

from peftstate.errors import DtypeMismatchError
from peftstate.sections import _bitsandbytes
from peftstate.sections._base import Section
from peftstate.sections._table import Table
from peftstate.sections._tensors import dtype_name, dtype_named

if TYPE_CHECKING:
    import torch

    from peftstate.sections._view import ModelView
    from peftstate.sections._walk import TensorSite


@attrs.frozen(kw_only=True)
class DtypeRecord:
    """The floating-point dtypes of a model; of quantized weights `quantization` tells.

    Attributes:
        base: Of the base model's tensors.
        adapters: Of each adapter's tensors.
        model: Of the tensors that PEFT holds beside both.
    """

    base: Table[str]
    adapters: Mapping[str, Table[str]]
    model: Table[str]

    def for_adapters(self, names: Collection[str]) -> DtypeRecord:
        """The record without the adapters that are not looked at."""
        kept = {name: part for name, part in self.adapters.items() if name in names}
        return attrs.evolve(self, adapters=kept)


def capture(view: ModelView) -> DtypeRecord:
    """Read the dtype of every tensor."""
    tensors = _floating(view)

    def table(part: str, adapter: str | None = None) -> Table[str]:
        return Table.of(
            {
                site.name: dtype_name(site.tensor.dtype)
                for site in tensors
                if site.part == part and site.adapter == adapter
            }
        )

    return DtypeRecord(
        base=table("base"),
        adapters={saved: table("adapter", live) for saved, live in view.adapters.items()},
        model=table("model"),
    )


def as_live(record: DtypeRecord, view: ModelView) -> DtypeRecord:
    """The record, with the live dtypes of biases that bitsandbytes casts when it runs their layers.

    Their values are compared in the dtype that they were saved in.
    """
    cast = {
        site.name: dtype_name(site.tensor.dtype)
        for site in view.tensors()
        if site.leaf == "bias" and site.part == "base" and _bitsandbytes.kind_of(site.module)
    }
    if all(record.base[name] == dtype for name, dtype in cast.items()):
        return record
    names = {site.name for site in _floating(view) if site.part == "base"}
    names |= record.base.exceptions.keys()
    saved = {name: dtype for name in names if (dtype := record.base[name]) is not None}
    return attrs.evolve(record, base=Table.of({**saved, **cast}))


def _floating(view: ModelView) -> list[TensorSite]:
    """The tensors that have a floating-point dtype of their own."""
    return [
        site
        for site in view.tensors()
        if site.tensor.is_floating_point()
        and not (site.leaf == "weight" and _bitsandbytes.kind_of(site.module))
    ]


def prepare(record: DtypeRecord, view: ModelView) -> None:
    """Cast the base model's tensors."""
    _cast_all(view, {("base", None): record.base})


def restore(record: DtypeRecord, view: ModelView) -> None:
    """Cast all tensors. An adapter's saved tensors are set, in their dtype, by the load."""
    saved = _of_adapters(record, view)
    saved["base", None] = record.base
    saved["model", None] = record.model
    _cast_all(view, saved)


def restore_adapters(record: DtypeRecord, view: ModelView) -> None:
    """Cast the adapters' tensors."""
    _cast_all(view, _of_adapters(record, view))


_Owner: TypeAlias = tuple[str, str | None]
"""What a tensor belongs to: the part, and the adapter's live name."""


def _of_adapters(record: DtypeRecord, view: ModelView) -> dict[_Owner, Table[str]]:
    """The dtypes of each adapter that is recorded."""
    return {
        ("adapter", live): record.adapters[saved]
        for saved, live in view.adapters.items()
        if saved in record.adapters
    }


def _cast_all(view: ModelView, saved: Mapping[_Owner, Table[str]]) -> None:
    """Cast the tensors of which the saved dtype is known."""
    casts = [
        _cast(site, saved[site.part, site.adapter][site.name])
        for site in _floating(view)
        if (site.part, site.adapter) in saved
    ]
    if any(casts):
        view.tensors_changed()


def _cast(site: TensorSite, name: str | None) -> bool:
    """Cast one tensor, unless that could give other values than the saved tensor had.

    Of a tensor that checkpoints hold, the digest says whether the cast was right. One that the
    config gives (a rotary embedding's frequencies) may be narrowed, as it was before; what
    narrowing lost, widening does not bring back.

    Returns:
        Whether it was cast.
    """
    tensor = site.tensor
    if name is None or name == dtype_name(tensor.dtype):
        return False
    dtype = dtype_named(name)
    is_right = site.persistent or _is_narrower(dtype, tensor.dtype)
    if dtype.is_floating_point and is_right:
        site.replace(tensor.detach().to(dtype))
    return dtype.is_floating_point and is_right


def _is_narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype has fewer bits than another."""
    return dtype.itemsize < other.itemsize


SECTION = Section(
    name="dtype",
    record=DtypeRecord,
    capture=capture,
    prepare=prepare,
    restore=restore,
    per_adapter=True,
    error=DtypeMismatchError,
)
