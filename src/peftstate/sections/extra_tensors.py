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
from peftstate.sections._adapter_tensors import adapter_tensors
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
        adapters: The parameters of each adapter that PEFT does not save.
    """

    base: Mapping[str, SidecarTensor]
    adapters: Mapping[str, Mapping[str, SidecarTensor]]

    def for_adapters(self, names: Collection[str]) -> ExtraTensorsRecord:
        """The record without the adapters that are not looked at."""
        kept = {name: tensors for name, tensors in self.adapters.items() if name in names}
        return attrs.evolve(self, adapters=kept)

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
    wanted = _origin.lost(view, found)
    for name in wanted:
        if found[name].site is None or not is_readable(found[name].tensor):
            raise ValueError(
                f"the weight {name} of the base model was changed since the model was wrapped, and "
                "cannot be saved, for it is quantized or not in this process. "
            )
    return ExtraTensorsRecord(
        base={name: SidecarTensor.of(f"base.{name}", found[name].tensor) for name in wanted},
        adapters={saved: _of_adapter(view, saved) for saved in view.adapters},
    )


def _of_adapter(view: ModelView, saved: str) -> dict[str, SidecarTensor]:
    """The parameters of an adapter that PEFT does not save.

    Buffers are left to be computed again (from a seed, as VeRA's projections are, or from the base
    model), and compared.
    """
    unsaved = adapter_tensors(view, saved, embeddings=False).unsaved
    return {
        name: SidecarTensor.of(f"adapters.{saved}.{name}", site.tensor)
        for name, site in sorted(unsaved.items())
        if site.leaf in site.module._parameters
    }


def capture_like(view: ModelView, record: ExtraTensorsRecord) -> ExtraTensorsRecord:
    """Look at the same tensors in a model."""
    found = base_tensors(view)
    return ExtraTensorsRecord(
        base={
            name: SidecarTensor.of(saved.tensor, found[name].tensor)
            for name, saved in record.base.items()
            if name in found
        },
        adapters={
            adapter: _look_up(view, adapter, tensors)
            for adapter, tensors in record.adapters.items()
            if adapter in view.adapters
        },
    )


def _look_up(
    view: ModelView, saved: str, tensors: Mapping[str, SidecarTensor]
) -> dict[str, SidecarTensor]:
    """An adapter's tensors of some names, as they are in a model."""
    return {
        site.name: SidecarTensor.of(tensors[site.name].tensor, site.tensor)
        for site in view.tensors()
        if site.adapter == view.adapters[saved] and site.name in tensors
    }


def restore(record: ExtraTensorsRecord, view: ModelView) -> None:
    """Put the base model's tensors in their places; adapters' tensors came with the others."""
    for name, base in base_tensors(view).items():
        if name in record.base and base.site is not None:
            base.site.replace(record.base[name].load().to(base.tensor.device))


def restore_adapters(record: ExtraTensorsRecord, view: ModelView) -> None:
    """Put the saved tensors of the adapters in their places."""
    for adapter, tensors in record.adapters.items():
        if adapter not in view.adapters or not tensors:
            continue
        live = view.adapters[adapter]
        if view.model.peft_config[live].is_prompt_learning:
            _make_trainable_form(view, live, tensors.keys())
        for site in view.tensors():
            if site.adapter == live and site.name in tensors:
                site.replace(tensors[site.name].load().to(site.tensor.device))


def _make_trainable_form(view: ModelView, adapter: str, names: Collection[str]) -> None:
    """Have a prompt computed as in training.

    PEFT loads it as the embedding that its layers computed, mostly without these layers
    (`peft/tuners/p_tuning/model.py::PromptEncoder.__init__`).
    """
    model = view.model
    model.peft_config[adapter].inference_mode = False
    if set(names) <= {site.name for site in view.tensors() if site.adapter == adapter}:
        return  # to make it again may take a tokenizer (`prompt_tuning/model.py`)
    before = model.prompt_encoder[adapter]
    is_trainable = any(tensor.requires_grad for tensor in before.parameters())
    model._setup_prompt_encoder(adapter)
    model.prompt_encoder[adapter].train(before.training).requires_grad_(is_trainable)


SECTION = Section(
    name="extra_tensors",
    record=ExtraTensorsRecord,
    capture=capture,
    capture_like=capture_like,
    restore=restore,
    per_adapter=True,
    error=AdapterMismatchError,
)
