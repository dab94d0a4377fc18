"""`adapters`: which adapters there are, their configs, and every one of their tensors.

PEFT loads what fits and warns, at best, of what does not. Here every tensor in the file and every
tensor in the model must be the saved one, to the last bit and in the saved dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._diff import Json
from peftstate._warn import warn
from peftstate.errors import AdapterMismatchError, UnverifiedWarning
from peftstate.sections import _merges
from peftstate.sections._adapter_ahead import reading
from peftstate.sections._adapter_config import config_fields, config_of
from peftstate.sections._adapter_tensors import AdapterTensors, adapter_tensors
from peftstate.sections._base import Section
from peftstate.sections._table import Table
from peftstate.sections._tensors import TensorRecord, tensor_records

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView
    from peftstate.sections._walk import Site


@attrs.frozen(kw_only=True)
class AdapterRecord:
    """One adapter.

    Attributes:
        folder: Its folder, relative to the manifest's; ``"."`` for its own.
        config: The fields of its PEFT config, sets sorted.
        tensors: What PEFT saves of it, under the names in PEFT's file.
        embeddings_saved: Whether the file holds the embedding layers of the base model too.
        unsaved: The adapter's tensors in the model that PEFT does not save (what is drawn from a
            seed, for instance).
        scaling: The factor that each layer applies.
    """

    folder: str
    config: Mapping[str, Json]
    tensors: Mapping[str, TensorRecord]
    embeddings_saved: bool
    unsaved: Mapping[str, TensorRecord]
    scaling: Table[float]


@attrs.frozen(kw_only=True)
class AdaptersRecord:
    """The adapters of a model.

    Attributes:
        adapters: The adapters by name, which is also the order they are loaded in.
        active: Names of the active ones; empty if none of these was, but another one, which says
            nothing of a model that has no others; `None` if the model has no active one.
        enabled: Whether the active ones are applied at all.
        merged: Names of those merged into the base model, in the order of merging.
        safe_merge: Whether they were merged with PEFT's `safe_merge`, which rounds in another way.
    """

    adapters: Mapping[str, AdapterRecord]
    active: tuple[str, ...] | None
    enabled: bool
    merged: tuple[str, ...]
    safe_merge: bool

    def for_adapters(self, names: Collection[str]) -> AdaptersRecord:
        """The record without the adapters that are not looked at."""
        active = self.active
        return attrs.evolve(
            self,
            adapters={name: record for name, record in self.adapters.items() if name in names},
            active=active and tuple(name for name in active if name in names),
            merged=tuple(name for name in self.merged if name in names),
        )

    def in_folders(self, folders: Mapping[str, str]) -> AdaptersRecord:
        """The record as another folder sees it, from which the adapters lie elsewhere."""
        moved = {
            name: attrs.evolve(record, folder=folders[name])
            for name, record in self.adapters.items()
        }
        return attrs.evolve(self, adapters=moved)


def capture(view: ModelView) -> AdaptersRecord:
    """Describe the adapters in the model.

    Raises:
        ValueError: They are in a state that no load can bring about; the text says what to do.
    """
    _refuse_unloadable(view)
    _warn_of_drawn_ahead(view)
    return _capture(view, None)


def _refuse_unloadable(view: ModelView) -> None:
    """Refuse states of which PEFT's files do not hold enough, or that PEFT has no setter for.

    Raises:
        ValueError: The model is in one of them.
    """
    from peft.tuners.ln_tuning.layer import LNTuningLayer

    if any(isinstance(layer, LNTuningLayer) and layer.merged for layer in view.layers()):
        # peft/tuners/ln_tuning/layer.py::LNTuningLayer.merge exchanges the two layers
        raise ValueError(
            "the adapter is merged, which in LN tuning puts the base model's layers in its place, "
            "and PEFT would save these; call unmerge_adapter() first"
        )
    if _is_merged_in_part(view):
        raise ValueError(
            "an adapter is merged into some of its layers only; merge it into the others, too, by "
            "merge_adapter(), or call unmerge_adapter()"
        )
    if len(set(_disabled(view))) > 1:
        raise ValueError(
            "adapters are disabled in some of their layers only; call disable_adapter_layers() or "
            "enable_adapter_layers() of the model's base_model, which do it in all"
        )
    for name, config in view.model.peft_config.items():
        if getattr(config, "use_trainable_adapters", False) and name != "default":
            # peft/peft_model.py::PeftModel.save_pretrained puts each adapter into its own folder
            raise ValueError(
                f"X-LoRA's adapter is called {name!r}, so that its folder would not hold the "
                "experts that it trained; call it 'default'"
            )
    if getattr(view.model, "_is_prompt_learning", False) and not _enabled(view):
        raise ValueError(
            "the prompt is disabled, which it can only be within disable_adapter(); save outside it"
        )


def _warn_of_drawn_ahead(view: ModelView) -> None:
    """Warn where a layer trains with random numbers that it drew ahead.

    They are more than its weights (`peft/tuners/lora/monteclora.py::BufferedMontecloraSampler`).
    """
    samplers = (getattr(layer, "lora_monteclora_sampler", None) for layer in view.layers())
    if any(sampler is not None and sampler.training for sampler in samplers):
        warn(
            "MonteCLoRA draws its noise ahead, and what it drew is not saved: the reloaded model "
            "predicts alike, and trains on with other noise.",
            UnverifiedWarning,
        )


def _is_merged_in_part(view: ModelView) -> bool:
    """Whether an adapter is merged into some of the layers that have it, and into others not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in view.layers() if isinstance(layer, BaseTunerLayer)]
    merged = {name for layer in layers for name in layer.merged_adapters}
    return any(
        set(layer.merged_adapters) != merged & layer._get_available_adapters() for layer in layers
    )


def capture_like(view: ModelView, record: AdaptersRecord) -> AdaptersRecord:
    """Capture for a comparison with a record: of the tensors that were saved."""
    found = _capture(view, record)
    if record.active == ():
        found = attrs.evolve(found, active=())
    # how it was merged leaves its trace in the weights, which `base_model` compares
    return attrs.evolve(found, safe_merge=record.safe_merge)


def read_ahead(view: ModelView, record: AdaptersRecord) -> AbstractContextManager[None]:
    """Have other threads read the tensors of an adapter."""
    return reading(view, {name: each.tensors.keys() for name, each in record.adapters.items()})


def _capture(view: ModelView, record: AdaptersRecord | None) -> AdaptersRecord:
    """Describe the adapters, each for a comparison with its record if there is one."""
    like: Mapping[str, AdapterRecord] = {} if record is None else record.adapters
    described = {saved: _describe(view, saved, like.get(saved)) for saved in view.adapters}
    unapplied = AdaptersRecord(
        adapters=described,
        active=None,
        enabled=True,
        merged=() if record is None else record.merged,
        safe_merge=False,
    )
    return applied_as_in(view, unapplied)


def applied_as_in(view: ModelView, record: AdaptersRecord) -> AdaptersRecord:
    """A record, with the model's word on which adapters are active, applied and merged.

    How an adapter's weights began is the model's word, too: PEFT leaves the config of one that is
    there already, and it says which base model the model has.
    """
    active = tuple(getattr(view.model, "active_adapters", ()))
    layers = [
        [saved for name in merged if (saved := view.saved_name(name))]
        for merged in _merges.merged_in(view.layers())
    ]
    return attrs.evolve(
        record,
        adapters={
            saved: attrs.evolve(adapter, config={**adapter.config, **_beginning(view, saved)})
            for saved, adapter in record.adapters.items()
        },
        active=tuple(saved for live in active if (saved := view.saved_name(live)))
        if active
        else None,
        enabled=_enabled(view),
        merged=_merges.order_of(layers, record.merged),
        safe_merge=_merges.is_safe(view.model),
    )


def _beginning(view: ModelView, saved: str) -> dict[str, Json]:
    """How the weights of LoRA began, by the config in the model."""
    config = config_fields(view.model.peft_config[view.adapters[saved]])
    return {key: config[key] for key in ("init_lora_weights",) if key in config}


def _describe(view: ModelView, saved: str, like: AdapterRecord | None) -> AdapterRecord:
    """Describe one adapter.

    Of a tensor that PEFT computes when it saves, what it is computed from is compared: computed
    again, on another device, it may have other last bits.
    """
    live = view.adapters[saved]
    ahead = view.read_ahead.get(saved)
    tensors = ahead.tensors if ahead else _tensors_of(view, saved, like)
    records = ahead.saved.records() if ahead else tensor_records(tensors.saved)
    config = config_fields(config_of(view.model, live))
    computed = (
        tensor_records(tensors.computed)
        if like is None
        else {name: like.tensors[name] for name in tensors.computed}
    )
    return AdapterRecord(
        folder=view.folders[saved],
        config=config
        if like is None
        else {key: config[key] for key in like.config if key in config},
        tensors=dict(sorted({**records, **computed}.items())),
        embeddings_saved=like is not None and like.embeddings_saved,
        unsaved=tensor_records({name: site.tensor for name, site in tensors.unsaved.items()}),
        scaling=_scaling(view, live),
    )


def _tensors_of(view: ModelView, saved: str, like: AdapterRecord | None) -> AdapterTensors:
    """The tensors of an adapter, of which those are in a file that were saved."""
    if like is None:
        return adapter_tensors(view, saved, embeddings=False)
    names = like.tensors.keys()
    return adapter_tensors(view, saved, embeddings=like.embeddings_saved, names=names)


def _enabled(view: ModelView) -> bool:
    """Whether adapters are applied."""
    from peft.tuners.adaption_prompt import AdaptionPromptModel
    from peft.tuners.xlora import XLoraModel

    if getattr(view.model, "_adapters_disabled", False):
        return False
    tuner = getattr(view.model, "base_model", None)
    if isinstance(tuner, AdaptionPromptModel):
        return bool(tuner._enabled)
    if isinstance(tuner, XLoraModel):
        return not tuner.disabled
    return not any(_disabled(view))


def _disabled(view: ModelView) -> list[bool]:
    """Of each layer that can be disabled, whether it is.

    Older releases of PEFT disable the copies of a module where the active adapter has none
    (`peft/utils/other.py::_set_adapter`), which changes nothing.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    active = set(getattr(view.model, "active_adapters", ()))
    layers: tuple[Any, ...] = view.layers()
    return [
        layer.disable_adapters
        for layer in layers
        if hasattr(layer, "disable_adapters")
        and not (isinstance(layer, AuxiliaryTrainingWrapper) and active.isdisjoint(layer._adapters))
    ]


def _scaling(view: ModelView, adapter: str) -> Table[float]:
    """The run-time scaling of each layer."""
    values = {}
    for site in view.sites():
        scaling = _scaling_in(site) if site.adapter == adapter else {}
        if adapter in scaling:
            values[site.name] = float(scaling[adapter])
    return Table.of(values)


def _scaling_in(site: Site) -> dict[str, float]:
    """The factors that a layer applies, by the adapters' names; those of other modules are none."""
    scaling = vars(site.module).get("scaling")
    return scaling if isinstance(scaling, dict) else {}


def restore(record: AdaptersRecord, view: ModelView) -> None:
    """Set scaling, active adapters, whether they are applied, and merge those that were merged.

    The tensors were set when the adapter was loaded. Merging rounds, so it must come before any
    forward pass: one on a CPU repacks 4-bit weights. Whether it gave the saved weights is seen by
    `base_model`.
    """
    restore_scaling(record, view)
    _restore_active(record, view)
    saved = dict.fromkeys(record.merged)  # or PEFT would merge it as often as it is named
    merged = [view.adapters[name] for name in saved if name in view.adapters]
    if merged and not _merges.merged_in(view.layers()):
        view.model.base_model.merge_adapter(merged, safe_merge=record.safe_merge)
        _merges.note(view.model, is_safe=record.safe_merge)
        view.changed()


def restore_scaling(record: AdaptersRecord, view: ModelView) -> None:
    """Set the factor that each layer applies."""
    factors = {
        view.adapters[saved]: adapter.scaling
        for saved, adapter in record.adapters.items()
        if saved in view.adapters
    }
    for site in view.sites():
        scaling = _scaling_in(site) if site.adapter in factors else {}
        if site.adapter in scaling:
            value = factors[site.adapter][site.name]
            if value is not None and value != scaling[site.adapter]:
                scaling[site.adapter] = value


def _restore_active(record: AdaptersRecord, view: ModelView) -> None:
    """Make the saved adapters the active ones, applied or not."""
    model = view.model
    saved = dict.fromkeys(record.active or ())  # PEFT would go through all layers for each
    active = [view.adapters[name] for name in saved if name in view.adapters]
    wanted = active or record.active is None
    if wanted and active != list(model.active_adapters):
        if len(active) == 1:
            model.set_adapter(active[0])
        else:  # PeftModel.set_adapter takes one name only
            model.base_model.set_adapter(active)
            model.active_adapter = next(iter(active), model.active_adapter)
        view.changed()  # adaption prompts are put in and taken out
    if record.enabled != _enabled(view):
        switch = "enable_adapter_layers" if record.enabled else "disable_adapter_layers"
        getattr(model.base_model, switch)()
        view.changed()


SECTION = Section(
    name="adapters",
    record=AdaptersRecord,
    capture=capture,
    capture_like=capture_like,
    read_ahead=read_ahead,
    restore=restore,
    per_adapter=True,
    error=AdapterMismatchError,
)
