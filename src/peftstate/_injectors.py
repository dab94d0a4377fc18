"""How an adapter is put into a model: by PEFT, or by PEFT without weights where these can wait."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import peft

from peftstate import _placeholders as placeholders
from peftstate._injection import readable_by_peft, without_word_of
from peftstate.sections._bitsandbytes_forms import kept

if TYPE_CHECKING:
    from torch import nn

    from peftstate._source import Source
    from peftstate.sections._view import ModelView

Inject = Callable[[Path, peft.PeftConfig], peft.PeftModel]
"""PEFT's `from_pretrained` on the base model: takes the folder, and the adapter's config."""
Load = Callable[[Any, Path, str], Any]
"""PEFT's `load_adapter`: takes the model, the folder, and the adapter's name."""
Wrap = Callable[[peft.PeftConfig], peft.PeftModel]
"""`placeholders.wrap` on the base model: takes the adapter's config."""


@attrs.frozen(kw_only=True)
class Injector:
    """How adapters are put into a bare base model.

    Attributes:
        inject: How PEFT loads the first adapter.
        load: How PEFT loads a further one.
        wrap: How the base model is wrapped without weights; `None` if PEFT is to load them.
    """

    inject: Inject
    load: Load
    wrap: Wrap | None

    def fit_for(self, source: Source, bare: ModelView, names: Collection[str]) -> Injector:
        """The same, but PEFT loads the weights where placeholders would not do.

        Args:
            source: What was read.
            bare: The bare base model.
            names: The names of the adapters in the model.
        """
        if placeholders.suffice(source, bare, names):
            return self
        return attrs.evolve(self, wrap=None)

    def put_in(
        self, base: nn.Module, source: Source, names: Mapping[str, str], extra: Collection[str]
    ) -> peft.PeftModel:
        """Put the adapters of a folder into a base model.

        Args:
            base: The base model.
            source: What was read from the folder.
            names: Name in the manifest → name in the model.
            extra: The names of the tensors of the folder's own adapter that are in the sidecar.
        """
        own = source.own_adapter
        configs = {name: source.adapters[name].peft_config() for name in names}
        further = {name: live for name, live in names.items() if name != own}
        if self.wrap is not None:
            model = self.wrap(configs[own])
            for name, live in further.items():
                placeholders.add(model, configs[name], live)
            return model
        with (
            readable_by_peft(source, own) as folder,
            kept(base),
            without_word_of(extra, names[own]),
        ):
            model = self.inject(folder, configs[own])
        for name, live in further.items():
            with readable_by_peft(source, name) as folder, kept(base):
                self.load(model, folder, live)
        return model
