"""`extra_tensors`: what is in the model but in no file, neither PEFT's nor the base checkpoint's.

PEFT saves what its config names. A norm or a head that was unfrozen by hand, embeddings that were
resized, BatchNorm statistics, weights that PiSSA and its kin rewrote, the layers that computed a
prompt: without these the reloaded model is another one. They go to the sidecar.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import attrs

from peftstate.errors import AdapterMismatchError
from peftstate.sections import _origin
from peftstate.sections._base import Section
from peftstate.sections._base_tensors import base_tensors
from peftstate.sections._tensors import SidecarTensor, is_readable

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView


@attrs.frozen(kw_only=True)
class ExtraTensorsRecord:
    """Tensors that only the sidecar has.

    Attributes:
        base: Of the base model, by name.
    """

    base: Mapping[str, SidecarTensor]

    def without(self, names: Collection[str]) -> ExtraTensorsRecord:
        """The record without tensors that turned out to be in PEFT's file."""
        kept = {name: tensor for name, tensor in self.base.items() if name not in names}
        return attrs.evolve(self, base=kept)


def capture(view: ModelView) -> ExtraTensorsRecord:
    """Find the tensors that no file would have.

    Raises:
        ValueError: One of them cannot be saved: it is a quantized weight, or is not to be read in
            this process.
    """
    found = base_tensors(view)
    wanted = _origin.lost(view)
    for name in wanted:
        if found[name].site is None or not is_readable(found[name].tensor):
            raise ValueError(
                f"the weight {name} of the base model was changed since the model was wrapped, and "
                "cannot be saved, for it is quantized or not in this process. "
            )
    return ExtraTensorsRecord(
        base={name: SidecarTensor.of(f"base.{name}", found[name].tensor) for name in wanted}
    )


def capture_like(view: ModelView, record: ExtraTensorsRecord) -> ExtraTensorsRecord:
    """Look at the same tensors in a model."""
    found = base_tensors(view)
    return ExtraTensorsRecord(
        base={
            name: SidecarTensor.of(f"base.{name}", found[name].tensor)
            for name in record.base
            if name in found
        }
    )


def restore(record: ExtraTensorsRecord, view: ModelView) -> None:
    """Put the saved tensors in their places."""
    for name, base in base_tensors(view).items():
        if name in record.base and base.site is not None:
            base.site.replace(record.base[name].load().to(base.tensor.device))


SECTION = Section(
    name="extra_tensors",
    record=ExtraTensorsRecord,
    capture=capture,
    capture_like=capture_like,
    restore=restore,
    error=AdapterMismatchError,
)
