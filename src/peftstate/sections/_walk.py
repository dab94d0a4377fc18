"""Every module and tensor of a model, with the part of the model that it belongs to.

A bare base model and the same model with adapters injected must give the same names, and an
adapter must be found again under another name. So everything belongs to one *part*:

- ``base``: the base model, under the names it has without adapters;
- ``model``: what PEFT puts around it (the `PeftModel`, the tuner), under its live name;
- ``adapter``: one of the adapters, under its live name without the adapter's own name in it, as
  PEFT writes it in its files. A layer that adapters share belongs to each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import attrs

from peftstate._modules import is_container, is_layer_of_peft
from peftstate.sections._peft_layers import (
    cached_layers,
    is_adapted_attention,
    original_key,
    plain_tensors,
    replicated_layers,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

Part: TypeAlias = Literal["base", "model", "adapter"]


class Site(NamedTuple):
    """A module and the part of the model that it belongs to; a tuple, for a load makes thousands.

    Attributes:
        part: The part.
        adapter: Name of the adapter if `part` is ``"adapter"``.
        name: The name inside the part.
        module: The module.
        shadowed: Whether a trained copy stands in for it, of whatever adapter (PEFT's
            `modules_to_save`).
        merged: Whether an adapter is merged into its tensors.
        adapted: Whether a layer of PEFT is around it.
        around: Of a layer of PEFT, the name of the base model's module that it is around.
    """

    part: Part
    adapter: str | None
    name: str
    module: nn.Module
    shadowed: bool = False
    merged: bool = False
    adapted: bool = False
    around: str | None = None


class TensorSite(NamedTuple):
    """A parameter, a buffer or another tensor, and the module that holds it; a tuple, too.

    Attributes:
        part: The part of the model that the tensor belongs to.
        adapter: Name of the adapter if `part` is ``"adapter"``.
        name: The name inside the part.
        module: The module that holds it.
        leaf: The name under which the module holds it.
        tensor: The live tensor.
        persistent: Whether a checkpoint holds it.
        shadowed: Whether a trained copy stands in for it, of whatever adapter.
        merged: Whether an adapter is merged into it.
        adapted: Whether a layer of PEFT is around the module.
    """

    part: Part
    adapter: str | None
    name: str
    module: nn.Module
    leaf: str
    tensor: torch.Tensor
    persistent: bool
    shadowed: bool = False
    merged: bool = False
    adapted: bool = False

    def replace(self, tensor: torch.Tensor) -> None:
        """Put other data, which may have another dtype, in the tensor's place."""
        # by name: peft/tuners/lora/layer.py::MultiheadAttention makes new parameters now and then
        parameter = self.module._parameters.get(self.leaf)
        if parameter is not None:
            parameter.data = tensor
        elif self.leaf in self.module._buffers:
            self.module._buffers[self.leaf] = tensor
        else:
            vars(self.module)[self.leaf][self.adapter] = tensor


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model has PEFT's adapters in it."""
    from peft.mixed_model import PeftMixedModel  # `peft` itself may be given our classes
    from peft.peft_model import PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))


def base_of(model: Any) -> nn.Module:
    """The base model inside a PEFT model (or the model itself), not compiled."""
    from peft.tuners.tuners_utils import BaseTuner

    base = model.get_base_model() if is_peft_model(model) else model
    if isinstance(base, BaseTuner):  # what older releases of PEFT take for the base under Poly
        base = base.model
    inner: nn.Module = getattr(base, "_orig_mod", base)
    return inner


def sites(model: Any, adapters: Collection[str]) -> list[Site]:
    """Every module of a model, each module once in each part that it belongs to.

    Args:
        model: The model.
        adapters: Names of the adapters whose modules are wanted.
    """
    return _Walk(model, adapters).run()


def tensors(model: Any, sites: Iterable[Site]) -> list[TensorSite]:
    """Every parameter and buffer of a model's modules; a shared one under each of its names."""
    adapters = frozenset(getattr(model, "peft_config", ())) if is_peft_model(model) else frozenset()
    found: dict[tuple[str, str | None, str], TensorSite] = {}
    for site in sites:
        if _may_hold(site):
            for tensor in _tensors_of(site, adapters):
                found.setdefault((tensor.part, tensor.adapter, tensor.name), tensor)
    return list(found.values())


def _may_hold(site: Site) -> bool:
    """Whether tensors may hang on a module itself, which most of PEFT's containers are without."""
    if site.module._parameters or site.module._buffers:
        return True
    cls: type = type(site.module)
    return site.adapter is not None and is_layer_of_peft(cls)


def _tensors_of(site: Site, adapters: frozenset[str]) -> Iterator[TensorSite]:
    """The tensors that hang on one module itself."""
    module = site.module
    keyed = site.part != "base" and is_container(module)
    for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        owner = leaf if keyed and leaf in adapters else site.adapter
        if keyed and leaf in adapters and site.adapter not in (None, leaf):
            continue  # another adapter's, in a container that both share
        yield TensorSite(
            part="adapter" if owner is not None else site.part,
            adapter=owner,
            name=site.name if owner == leaf and keyed else _join(site.name, leaf),
            module=module,
            leaf=leaf,
            tensor=tensor,
            persistent=leaf not in module._non_persistent_buffers_set,
            shadowed=site.shadowed,
            merged=site.merged,
            adapted=site.adapted,
        )
    for leaf, tensor in plain_tensors(module, site.adapter) if site.adapter is not None else ():
        yield TensorSite(
            part=site.part,
            adapter=site.adapter,
            name=_join(site.name, leaf),
            module=module,
            leaf=leaf,
            tensor=tensor,
            persistent=False,
        )


def _join(name: str, child: str) -> str:
    """A dotted name."""
    return f"{name}.{child}" if name else child


@attrs.frozen
class _Over:
    """What the layers of PEFT around a module of the base model do to it."""

    shadowed: bool
    merged: bool
    adapted: bool

    def and_by(self, layer: Any, adapters: Collection[str]) -> _Over:
        """The same with one more layer around it.

        Args:
            layer: The layer.
            adapters: The names of all adapters of the model.
        """
        cls: type = type(layer)
        if _holds_copies(cls):  # of which the forward pass takes none where one is missing
            copied = not layer.disable_adapters and layer.modules_to_save.keys() >= set(adapters)
            return _Over(self.shadowed or copied, self.merged, adapted=True)
        merged = bool(getattr(layer, "merged_adapters", ()))
        return _Over(self.shadowed, self.merged or merged, adapted=True)


@cache
def _holds_copies(cls: type) -> bool:
    """Whether the layers of a class hold trained copies of the module that they are around."""
    from peft.utils.other import ModulesToSaveWrapper

    return issubclass(cls, ModulesToSaveWrapper)


_NOTHING = _Over(shadowed=False, merged=False, adapted=False)


class _Walk:
    """One walk over a model."""

    def __init__(self, model: Any, wanted: Collection[str]) -> None:
        self._model = model
        self._base = base_of(model)
        self._adapters = tuple(getattr(model, "peft_config", ())) if is_peft_model(model) else ()
        self._wanted = frozenset(wanted)
        self._unwanted = frozenset(self._adapters) - self._wanted
        self._cached = cached_layers(model)
        self._replicated = replicated_layers(model) if self._adapters else None
        self._seen: set[int] = set()
        self._found: list[Site] = []

    def run(self) -> list[Site]:
        """All sites."""
        if self._model is self._base or not self._adapters:
            self._walk_base(self._base, "", "")
        else:
            self._walk_peft(self._model, "", adapter=None)
        return self._found

    def _first_visit(self, module: nn.Module) -> bool:
        """Whether a module was not met before."""
        if id(module) in self._seen:
            return False
        self._seen.add(id(module))
        return True

    def _walk_base(self, module: nn.Module, name: str, live: str, over: _Over = _NOTHING) -> None:
        """The base model, looking through the layers that PEFT put in."""
        if not self._first_visit(module):
            return
        original = original_key(module)
        if original is not None:
            self._walk_layer(module, name, live, original, over)
            return
        self._found.append(
            Site("base", None, name, module, over.shadowed, over.merged, over.adapted)
        )
        for adapter, key, layer in self._cached.get(id(module), ()):
            if adapter in self._wanted:
                self._found.append(Site("adapter", adapter, _join(live, key), layer))
        numbers = self._numbers_of(module)
        for key, child in module._modules.items():
            if child is not None:
                inner = _join(name, numbers.get(key, key))
                self._walk_base(child, inner, _join(live, key), over)

    def _numbers_of(self, module: nn.Module) -> dict[str, str]:
        """Of a list of replicated layers, the number that each has in the bare model."""
        numbers = self._replicated
        if numbers is None:
            return {}
        from torch import nn

        if not isinstance(module, nn.ModuleList) or len(module) != len(numbers):
            return {}
        self._replicated = None  # there is one such list
        return {str(new): str(old) for new, old in enumerate(numbers)}

    def _walk_layer(
        self, module: nn.Module, name: str, live: str, original: str, over: _Over
    ) -> None:
        """A layer of PEFT: first the module that it replaces, then what belongs to the adapters."""
        replaced = module._modules[original]
        if replaced is not None:
            self._walk_base(
                replaced, name, _join(live, original), over.and_by(module, self._adapters)
            )
        held = _keys_of(module)
        members = [name for name in self._adapters if name in held]
        for adapter in members or self._owners(module):
            self._add(adapter, live, module, around=name)
        if not self._adapters:  # a base model by itself: what is in it of others is not looked at
            return
        for key, child in module._modules.items():
            if key != original and child is not None:
                self._walk_shared(child, _join(live, key), members)

    def _add(
        self, adapter: str, live: str, module: nn.Module, *, around: str | None = None
    ) -> None:
        """Add a module of an adapter, if that is wanted."""
        if adapter in self._wanted:
            self._found.append(Site("adapter", adapter, live, module, around=around))

    def _owners(self, module: nn.Module) -> tuple[str, ...]:
        """The adapters of a layer that holds nothing by the names of adapters."""
        if self._adapters and is_adapted_attention(module):
            return tuple(self._model.active_adapters)
        return self._adapters

    def _walk_shared(self, module: nn.Module, live: str, members: list[str]) -> None:
        """What a layer of PEFT holds: mostly containers whose keys are adapters' names."""
        if not is_container(module):
            self._walk_peft(module, live, adapter=next(iter(members), None))
            return
        if not self._first_visit(module):
            return
        for member in members:
            self._add(member, live, module)
        if not members:
            self._found.append(Site("model", None, live, module))
        for key, child in module._modules.items():
            if child is not None and key not in self._unwanted:
                adapter = key if key in self._wanted else None
                inner = live if adapter else _join(live, key)
                self._walk_peft(child, inner, adapter=adapter)

    def _walk_peft(self, module: nn.Module, live: str, *, adapter: str | None) -> None:
        """What PEFT puts around or beside the base model."""
        if module is self._base or module._modules.get("_orig_mod") is self._base:
            self._walk_base(self._base, "", live)
            return
        if adapter is None and is_container(module):
            self._walk_shared(module, live, [])
            return
        if not self._first_visit(module):
            return
        if adapter is None:
            self._found.append(Site("model", None, live, module))
        else:
            self._add(adapter, live, module)
        children = sorted(module._modules.items(), key=lambda item: item[0] != "base_model")
        for key, child in children:
            if child is not None:
                self._walk_peft(child, _join(live, key), adapter=adapter)


def _keys_of(module: nn.Module) -> set[str]:
    """The keys by which a layer of PEFT holds anything."""
    children = (child for child in module._modules.values() if child is not None)
    containers: list[Any] = [child for child in children if is_container(child)]
    return {key for container in containers for key in container}
