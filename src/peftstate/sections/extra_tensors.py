"""`extra_tensors`: what is in the model but in no file, neither PEFT's nor the base checkpoint's.

PEFT saves what its config names. A norm or a head that was unfrozen by hand, embeddings that were
resized, BatchNorm statistics, weights that PiSSA and its kin rewrote, RoPE's frequencies that a
cast has rounded, the layers that computed a prompt: without these the reloaded model is another
one. They go to the sidecar.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import attrs

from peftstate._warn import warn
from peftstate.errors import AdapterMismatchError, MergedWeightsWarning
from peftstate.sections import _merges, _origin
from peftstate.sections._adapter_tensors import adapter_tensors
from peftstate.sections._base import Section
from peftstate.sections._base_tensors import BaseTensor, base_tensors
from peftstate.sections._bitsandbytes_forms import form_of
from peftstate.sections._config_buffers import config_buffers
from peftstate.sections._quantized_weights import QuantizedWeight, can_keep
from peftstate.sections._tensors import SidecarTensor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftstate.sections._view import ModelView
    from peftstate.sections._walk import TensorSite


@attrs.frozen(kw_only=True)
class ExtraTensorsRecord:
    """Tensors that only the sidecar has.

    Attributes:
        base: Of the base model, by name; one that is tied is there under each of its names.
        adapters: The parameters of each adapter that PEFT does not save.
        quantized: Quantized weights of the base model, by the names of their layers.
    """

    base: Mapping[str, SidecarTensor]
    adapters: Mapping[str, Mapping[str, SidecarTensor]]
    quantized: Mapping[str, QuantizedWeight]

    @property
    def has_base(self) -> bool:
        """Whether there is anything of the base model."""
        return bool(self.base or self.quantized)

    def for_adapters(self, names: Collection[str]) -> ExtraTensorsRecord:
        """The record without the adapters that are not looked at."""
        kept = {name: tensors for name, tensors in self.adapters.items() if name in names}
        return attrs.evolve(self, adapters=kept)

    def without(self, names: Collection[str]) -> ExtraTensorsRecord:
        """The record without tensors that turned out to be in PEFT's file."""
        return attrs.evolve(
            self,
            base={name: tensor for name, tensor in self.base.items() if name not in names},
            quantized={
                layer: weight
                for layer, weight in self.quantized.items()
                if layer + _WEIGHT not in names
            },
        )

    def among(self, names: Collection[str]) -> set[str]:
        """Of the names of the base model's tensors those that are in the record."""
        layers = {layer + _WEIGHT for layer in self.quantized}
        return {
            name
            for name in names
            if name in self.base or name in layers or name.rpartition(".")[0] in layers
        }


_WEIGHT = ".weight"


def capture(view: ModelView) -> ExtraTensorsRecord:
    """Find the tensors that no file would have.

    Raises:
        ValueError: One of them cannot be saved: it is quantized by something else than
            bitsandbytes, or is not to be read in this process.
    """
    found = base_tensors(view)
    wanted = _wanted(view, found)
    quantized: dict[str, nn.Module] = {}
    for name in wanted:
        owner = found[name].owner
        if not found[name].is_readable:
            raise ValueError(
                f"{_CHANGED.format(name)} it is not in this process (offloaded, or a shard); save "
                "it where it is whole"
            )
        if found[name].site is not None:
            continue
        if not can_keep(owner.module):
            raise ValueError(
                f"{_CHANGED.format(name)} it is quantized in a way that cannot be put back; load "
                "the base model anew, and the adapter onto it, and save that"
            )
        quantized[owner.name.removesuffix(_WEIGHT)] = owner.module
    sites = _sites(view)
    kept = [*(name for name in wanted if name in sites), *_origin.lost_buffers(view)]
    return ExtraTensorsRecord(
        base=_of_base({name: sites[name].tensor for name in kept}),
        adapters={saved: _of_adapter(view, saved) for saved in view.adapters},
        quantized={name: _quantized(name, module) for name, module in quantized.items()},
    )


def _sites(view: ModelView) -> dict[str, TensorSite]:
    """The tensors of the base model that can be put back one by one, and where they hang."""
    found = base_tensors(view).items()
    return {
        **{name: base.site for name, base in found if base.site is not None},
        **config_buffers(view),
    }


def _of_base(tensors: Mapping[str, torch.Tensor]) -> dict[str, SidecarTensor]:
    """Describe tensors of the base model; tied ones are one in the sidecar."""
    first: dict[int, SidecarTensor] = {}
    described = {}
    for name, tensor in tensors.items():
        if id(tensor) not in first:
            first[id(tensor)] = SidecarTensor.of(f"base.{name}", tensor)
        described[name] = first[id(tensor)]
    return described


_CHANGED = (
    "the weight {} of the base model was changed since the model was wrapped, and cannot be saved:"
)


def _quantized(name: str, module: nn.Module) -> QuantizedWeight:
    """Describe the weight of a quantized layer."""
    return QuantizedWeight.of(f"quantized.{name}", module)


def _wanted(view: ModelView, found: Mapping[str, BaseTensor]) -> list[str]:
    """The names of the base model's tensors to save; of those that are not, a warning tells."""
    lost = _origin.lost(view, found)
    merged = {name for name, base in found.items() if base.owner.merged} - set(lost)
    if view.keeps_merged:
        return sorted({*lost, *merged})
    reason = _merges.obstacle(view) if merged else None
    if reason is not None:
        warn(
            f"The adapter is merged into the base model, and {reason}. So it is not certain that "
            "merging it again on load gives these weights; if not, the load raises. Save with "
            "keep_merged_weights=True to keep the merged weights themselves, or call "
            "unmerge_adapter() first.",
            MergedWeightsWarning,
        )
    return lost


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
    """Look at the same tensors in a model.

    A quantized weight in another form is left to `base_model`, whose digests are the same in all.
    """
    sites = _sites(view) if record.base else {}
    layers = dict(view.base_modules()) if record.quantized else {}
    return ExtraTensorsRecord(
        base={
            name: SidecarTensor.of(saved.tensor, sites[name].tensor)
            for name, saved in record.base.items()
            if name in sites
        },
        adapters={
            adapter: _look_up(view, adapter, tensors)
            for adapter, tensors in record.adapters.items()
            if adapter in view.adapters
        },
        quantized={
            name: _quantized(name, layers[name]) if form_of(layers[name]) == saved.form else saved
            for name, saved in record.quantized.items()
            if name in layers and can_keep(layers[name])
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
    owners: dict[str, torch.Tensor] = {}
    for name, site in _sites(view).items() if record.base else ():
        if name in record.base:
            saved = record.base[name]
            if owners.setdefault(saved.tensor, site.tensor) is not site.tensor:
                saved = attrs.evolve(saved, data=saved.load().clone())  # not tied in this model
            _put(saved, site)
    if record.quantized:
        for name, module in view.base_modules():
            if name in record.quantized:
                record.quantized[name].put_back(module)
    if record.has_base:
        view.tensors_changed()
    _end_initialisations(record, view)


def _end_initialisations(record: ExtraTensorsRecord, view: ModelView) -> None:
    """Have no adapter rewrite the base model later, where that is done already.

    A KaSA layer that PEFT loaded onto the meta device does so when it first runs
    (`peft/tuners/lora/variants.py::KasaLinearVariant.init`).
    """
    if not record.has_base:
        return
    for layer in view.layers():
        deferred = getattr(layer, "_lora_kasa_truncation_deferred", None)
        if deferred:
            deferred.clear()


def restore_adapters(record: ExtraTensorsRecord, view: ModelView) -> None:
    """Put the saved tensors of the adapters in their places."""
    for adapter, tensors in record.adapters.items():
        if adapter not in view.adapters or not tensors:
            continue
        live = view.adapters[adapter]
        if view.model.peft_config[live].is_prompt_learning:
            _make_trainable_form(view, live, tensors.keys())
        loses_ranks = view.model.peft_config[live].peft_type == "ADALORA"
        for site in view.tensors():
            if site.adapter == live and site.name in tensors:
                saved = tensors[site.name]
                rank = _rank_dimension(site.name) if loses_ranks else None
                _put(saved, site, any_size_of=rank)


def _rank_dimension(name: str) -> int:
    """The dimension of an AdaLoRA matrix that is as long as its rank.

    PEFT saves and loads the ranks that are left, and trains on with all
    (`peft/tuners/adalora/model.py::AdaLoraModel.resize_modules_by_rank_pattern`).
    """
    return 1 if name.endswith("lora_B") else 0


def _put(saved: SidecarTensor, site: TensorSite, *, any_size_of: int | None = None) -> None:
    """Put a saved tensor in its place, if it fits there; if not, the comparison tells.

    Kernels take the shape of a weight from the layer that it is in, and read as far as that.

    Args:
        saved: The tensor.
        site: The place.
        any_size_of: A dimension in which it may be of another size.
    """
    wanted, found = list(saved.shape), list(site.tensor.shape)
    if any_size_of is not None and len(wanted) == len(found):
        del wanted[any_size_of], found[any_size_of]
    if wanted == found:
        site.replace(saved.load().to(site.tensor.device))


def _make_trainable_form(view: ModelView, adapter: str, names: Collection[str]) -> None:
    """Have a prompt computed as in training.

    PEFT loads it as the embedding that its layers computed, mostly without these layers
    (`peft/tuners/p_tuning/model.py::PromptEncoder.__init__`).
    """
    model = view.model
    model.peft_config[adapter].inference_mode = False
    if set(names) <= {site.name for site in view.tensors() if site.adapter == adapter}:
        return
    if hasattr(model.peft_config[adapter], "tokenizer_name_or_path"):
        return  # which the config names, and may have run code of (`prompt_tuning/model.py`)
    before = model.prompt_encoder[adapter]
    is_trainable = any(tensor.requires_grad for tensor in before.parameters())
    embeddings = model.word_embeddings
    model._setup_prompt_encoder(adapter)
    model.word_embeddings = embeddings  # a wrapper may be around them by now, for PEFT to find
    model.prompt_encoder[adapter].train(before.training).requires_grad_(is_trainable)
    view.changed()


SECTION = Section(
    name="extra_tensors",
    record=ExtraTensorsRecord,
    capture=capture,
    capture_like=capture_like,
    restore=restore,
    per_adapter=True,
    error=AdapterMismatchError,
)
