"""How sections see a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._modules import layers_of_peft
from peftstate.sections import _walk

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftstate.sections._adapter_ahead import ReadAhead
    from peftstate.sections._seen import Looks
    from peftstate.sections._tensors import TensorRecord

_TOKENIZER = "_peftstate_tokenizer"
FINGERPRINTS = ("full", "sampled", "off")
"""What digests of a base model may cover: every byte, some places of each tensor, nothing."""


def keep_tokenizer(model: Any, tokenizer: Any) -> None:
    """Have a model carry the tokenizer that goes with it."""
    setattr(model, _TOKENIZER, tokenizer)


class _Walked:
    """What is looked at of a model's modules and tensors, found when it is first asked for.

    Attributes:
        base_tensors: What `_base_tensors` made of them.
        adapter_tensors: What `_adapter_tensors` made of them, for each adapter.
    """

    def __init__(self, model: Any, adapters: Collection[str]) -> None:
        self._model = model
        self._adapters = tuple(adapters)
        self.base_tensors: dict[str, Any] = {}
        self.adapter_tensors: dict[str, Any] = {}

    def forget(self) -> None:
        """Look again when it is next asked for."""
        vars(self).pop("sites", None)
        vars(self).pop("layers", None)
        self.forget_tensors()

    def forget_tensors(self) -> None:
        """Look again for the tensors; the modules are the same."""
        vars(self).pop("tensors", None)
        self.base_tensors.clear()
        self.adapter_tensors.clear()

    @cached_property
    def sites(self) -> tuple[_walk.Site, ...]:
        """The modules."""
        return tuple(_walk.sites(self._model, self._adapters))

    @cached_property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers of PEFT."""
        return tuple(layers_of_peft(self._model))

    @cached_property
    def tensors(self) -> tuple[_walk.TensorSite, ...]:
        """The parameters and buffers."""
        found = _walk.tensors(self._model, self.sites)
        return tuple(site for site in found if site.adapter in (None, *self._adapters))


@attrs.frozen(kw_only=True)
class ModelView:
    """A PEFT model, or a bare base model, and which of its adapters are looked at.

    Attributes:
        model: The model, a `torch.nn.Module`.
        adapters: The adapters, in order: name in the manifest → name in the model.
        folders: The folder of each adapter, relative to the manifest's; ``"."`` is its own.
        fingerprint: What digests of the base model cover, one of `FINGERPRINTS`.
        tokenizer: The tokenizer that goes with the model, or a processor that holds one.
        probe: Inputs to predict on, as the model's `forward` takes them.
        keeps_merged: Whether the weights that adapters are merged into are saved themselves.
        saved_shapes: Shapes of the tensors in the files of a load; `None` if there are none.
        known: Names of tensors of the base model that need not be read: another thread compares
            them, or they were compared before and look the same.
        looks: How the base model's tensors looked before they are read, for what they give to be
            remembered; `None` if it is not to be.
        memo: Records of the base model's tensors that were made already. A view, and those made
            from it, are for one moment: the model must not change meanwhile.
        read_ahead: The adapters that other threads read already, by their names in the manifest.
        walked: What was found in the model at one moment; `None` if it may change meanwhile.
    """

    model: Any
    adapters: Mapping[str, str] = attrs.field(factory=dict)
    folders: Mapping[str, str] = attrs.field(factory=dict)
    fingerprint: str = "full"
    tokenizer: Any = None
    probe: Mapping[str, torch.Tensor] | None = None
    keeps_merged: bool = False
    saved_shapes: frozenset[tuple[int, ...]] | None = None
    known: frozenset[str] = frozenset()
    looks: Looks | None = attrs.field(default=None, eq=False, repr=False)
    memo: dict[str, TensorRecord] = attrs.field(factory=dict, eq=False, repr=False)
    read_ahead: dict[str, ReadAhead] = attrs.field(factory=dict, eq=False, repr=False)
    walked: _Walked | None = attrs.field(default=None, eq=False, repr=False)

    @classmethod
    def of(cls, model: Any, *, fingerprint: str = "full") -> ModelView:
        """The view of all adapters of a model, under their own names."""
        names = list(model.peft_config) if _walk.is_peft_model(model) else []
        return cls(
            model=model,
            adapters={name: name for name in names},
            folders={name: "." if name == "default" else name for name in names},
            fingerprint=fingerprint,
            tokenizer=getattr(model, _TOKENIZER, None),
        )

    def limited_to(self, names: Collection[str]) -> ModelView:
        """The view of some of the adapters."""
        return self._of_adapters(
            {name: live for name, live in self.adapters.items() if name in names},
            {name: folder for name, folder in self.folders.items() if name in names},
        )

    def only(self, adapter: str) -> ModelView:
        """The view of one adapter, as the manifest in its own folder describes it."""
        return self._of_adapters({adapter: self.adapters[adapter]}, {adapter: "."})

    def _of_adapters(self, adapters: Mapping[str, str], folders: Mapping[str, str]) -> ModelView:
        """The view of other adapters; of this moment, if this one is."""
        walked = None if self.walked is None else _Walked(self.model, adapters.values())
        return attrs.evolve(self, adapters=adapters, folders=folders, walked=walked)

    def now(self) -> ModelView:
        """The view that walks over the model once: what puts something into it calls `changed`."""
        return attrs.evolve(self, walked=_Walked(self.model, self.adapters.values()))

    def once(self) -> ModelView:
        """The view that walks over the model once: this one, if it does."""
        return self.now() if self.walked is None else self

    def changed(self) -> None:
        """Note that other modules or tensors were put into the model."""
        if self.walked is not None:
            self.walked.forget()

    def tensors_changed(self) -> None:
        """Note that other tensors were put into the model's modules."""
        if self.walked is not None:
            self.walked.forget_tensors()

    @property
    def base(self) -> Any:
        """The bare base model; adapters may be injected in it."""
        return _walk.base_of(self.model)

    def saved_name(self, live: str) -> str | None:
        """The name in the manifest of one of the model's adapters, if it is looked at."""
        return next((saved for saved, name in self.adapters.items() if name == live), None)

    def sites(self) -> tuple[_walk.Site, ...]:
        """The modules, those of adapters that are not looked at left out."""
        return (self.walked or _Walked(self.model, self.adapters.values())).sites

    def tensors(self) -> tuple[_walk.TensorSite, ...]:
        """The parameters and buffers, those of adapters that are not looked at left out."""
        return (self.walked or _Walked(self.model, self.adapters.values())).tensors

    def layers(self) -> tuple[nn.Module, ...]:
        """The layers that PEFT put into the model, whichever adapters they have."""
        return (self.walked or _Walked(self.model, ())).layers

    def base_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The base model's modules under their original names, adapters looked through."""
        return ((site.name, site.module) for site in self.sites() if site.part == "base")
