"""The tensors of the base model that a checkpoint of it holds, and their records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import attrs

from peftstate._progress import progress
from peftstate._work import in_threads
from peftstate.sections import _bitsandbytes
from peftstate.sections import _bitsandbytes_forms as forms
from peftstate.sections._host_bytes import wait_until_written
from peftstate.sections._peft_layers import original
from peftstate.sections._remembered import remembered_digest
from peftstate.sections._tensors import TensorRecord, dtype_name, is_readable, tensor_record
from peftstate.sections._walk import TensorSite

if TYPE_CHECKING:
    import torch

    from peftstate.sections._view import ModelView


@attrs.frozen(kw_only=True)
class BaseTensor:
    """A tensor of the base model.

    Attributes:
        make: Gives the tensor; of a quantized weight it is one of those that stand for it, which
            takes work.
        owner: The parameter or the buffer that it is, or that it stands for with others.
        site: Where it hangs, if it is one that can be replaced.
        shadowed: Whether a trained copy stands in for it.
        replayed: Whether a load brings it about again: an adapter is merged into it, or running a
            4-bit layer, or asking for its state dict, may have rounded its scales.
        computed: Whether operations of torch make it of others: the scales of a quantized weight.
    """

    make: Callable[[], torch.Tensor]
    owner: TensorSite
    site: TensorSite | None
    shadowed: bool
    replayed: bool
    computed: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor."""
        return self.make()

    @property
    def is_readable(self) -> bool:
        """Whether its values can be read in this process; no tensor is made to find out."""
        return self.site is None or is_readable(self.site.tensor)


def base_tensors(view: ModelView) -> dict[str, BaseTensor]:
    """The base model's tensors by name, quantized weights in their canonical form.

    Tensors that are made of others (torchao's) come as those others. Buffers that checkpoints do
    not hold are left out: the config gives them, on each kind of device with other last bits.
    """
    if view.walked is None:
        return dict(_base_tensors(view))
    if not view.walked.base_tensors:
        view.walked.base_tensors.update(_base_tensors(view))
    return dict(view.walked.base_tensors)


def _base_tensors(view: ModelView) -> Iterator[tuple[str, BaseTensor]]:
    """The base model's tensors, a module's quantized weight among its others."""
    canonical: dict[int, Mapping[str, Callable[[], torch.Tensor]]] = {}
    for site in view.tensors():
        module = site.module
        if site.part != "base" or not site.persistent:
            continue
        if site.leaf == "weight" and _bitsandbytes.kind_of(module) is not None:
            if id(module) not in canonical:
                canonical[id(module)] = _bitsandbytes.canonical_tensors(module) or {}
            if canonical[id(module)]:
                yield from _canonical(site, canonical[id(module)])
                continue
        for name, tensor in _plain(site.name, site.tensor):
            yield (
                name,
                BaseTensor(
                    make=partial(_itself, tensor),
                    owner=site,
                    site=site if tensor is site.tensor else None,
                    shadowed=site.shadowed,
                    replayed=site.merged,
                ),
            )
    yield from _parametrized(view)


def _parametrized(view: ModelView) -> Iterator[tuple[str, BaseTensor]]:
    """The scales of 4-bit parameters that are no layer's weight, such as those of fused experts.

    Their nibbles are parameters (`bitsandbytes/nn/parametrize.py`); the scales are no tensors of a
    module, so that no walk meets them.
    """
    if not _bitsandbytes.knows_parametrizations():
        return
    for name, module in view.base_modules():
        if _bitsandbytes.kind_of(module) != _bitsandbytes.PARAMETRIZATION:
            continue
        for key, make in (_bitsandbytes.canonical_tensors(module) or {}).items():
            owner = TensorSite(
                part="base",
                adapter=None,
                name=f"{name}{SCALES}",
                module=module,
                leaf=SCALES.removeprefix("."),
                tensor=forms.quant_state(module).absmax,
                persistent=True,
            )
            yield (
                f"{name}{SCALES}.{key}",
                BaseTensor(
                    make=make,
                    owner=owner,
                    site=None,
                    shadowed=False,
                    replayed=False,
                    computed=True,
                ),
            )


SCALES = ".quant_state"
"""In the names of the scales of 4-bit parameters, which manifests of schema 1 do not have."""


def _canonical(
    site: TensorSite, tensors: Mapping[str, Callable[[], torch.Tensor]]
) -> Iterator[tuple[str, BaseTensor]]:
    """The tensors that stand for a quantized weight."""
    rounded = forms.form_of(site.module) != forms.FRESH
    for key, make in tensors.items():
        yield (
            f"{site.name.removesuffix('weight')}{key}",
            BaseTensor(
                make=make,
                owner=site,
                site=None,
                shadowed=site.shadowed,
                replayed=site.merged or (rounded and key.endswith("absmax")),
                computed=key != site.leaf,
            ),
        )


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or the plain tensors that a subclass of it is made of."""
    if is_readable(tensor) and hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that need not be made."""
    return tensor


def records(view: ModelView, tensors: Mapping[str, BaseTensor]) -> dict[str, TensorRecord]:
    """Describe tensors as they are, each once for all who look at the model through a view."""
    missing = {name: base for name, base in tensors.items() if name not in view.memo}
    sampled = view.fingerprint == "sampled"

    def describe(name: str, digests: Digests) -> TensorRecord:
        base = tensors[name]
        if view.fingerprint == "off" or base.shadowed:
            return tensor_record(base.tensor, read=False)
        return digests.record(base, sampled=sampled)

    with progress("Digesting the base model", len(missing), "tensors") as reach:
        view.memo.update(described_in_threads(missing, describe, reach, remembers=True))
    return {name: view.memo[name] for name in tensors}


@attrs.frozen(kw_only=True)
class Digests:
    """What tensors gave that were read already, for tied ones are there under several names.

    Attributes:
        remembers: Whether what earlier loads computed of the same bytes will do.
    """

    remembers: bool = False
    _found: dict[tuple[int, str | None, bool], TensorRecord] = attrs.field(factory=dict)

    def record(
        self, base: BaseTensor, dtype: str | None = None, *, sampled: bool = False
    ) -> TensorRecord:
        """Describe a tensor as `tensor_record` does."""
        if base.site is None:  # made for this, and gone afterwards
            return self._describe(base.tensor, dtype, sampled=sampled)
        key = (id(base.site.tensor), dtype, sampled)
        if key not in self._found:
            self._found[key] = self._describe(base.site.tensor, dtype, sampled=sampled)
        return self._found[key]

    def _describe(self, tensor: torch.Tensor, dtype: str | None, *, sampled: bool) -> TensorRecord:
        """Describe a tensor that was not read through this."""
        if sampled or not self.remembers or not is_readable(tensor):
            return tensor_record(tensor, dtype, sampled=sampled)
        return TensorRecord(
            dtype=dtype or dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            digest=remembered_digest(tensor, dtype),
        )


def described_in_threads(
    tensors: Mapping[str, BaseTensor],
    describe: Callable[[str, Digests], TensorRecord],
    reach: Callable[[int], object],
    *,
    remembers: bool = False,
) -> dict[str, TensorRecord]:
    """Describe tensors, several at a time but for those that take operations of torch.

    Its threads and several of ours would wait for each other.

    Args:
        tensors: The tensors by name.
        describe: Describes one of a name, by digests that may be there already.
        reach: Told how many are done.
        remembers: As in `Digests`.
    """
    digests = Digests(remembers=remembers)
    found = {name: describe(name, digests) for name, base in tensors.items() if base.computed}
    rest = {name: base for name, base in tensors.items() if name not in found}
    tied = {id(base.owner.tensor): name for name, base in rest.items() if base.site is not None}
    alone = [name for name, base in rest.items() if base.site is None]
    wanted = [*alone, *tied.values()]
    wait_until_written(rest[name].owner.tensor for name in wanted)
    sizes = {name: rest[name].owner.tensor.nbytes for name in wanted}
    wanted.sort(key=sizes.__getitem__, reverse=True)  # for no thread to be left with a large one
    done = in_threads(
        wanted,
        lambda name: describe(name, digests),
        lambda number: reach(len(found) + number),
        nbytes=sum(sizes.values()),
    )
    described = found | dict(zip(wanted, done, strict=True))
    return {
        name: described[name] if name in described else describe(name, digests) for name in tensors
    }


def embedding_weight(base: Any, side: Literal["input", "output"]) -> torch.Tensor | None:
    """The weight of a model's own input or output embeddings, where it has them."""
    getter = getattr(base, f"get_{side}_embeddings", None)
    if getter is None:
        return None
    try:
        layer = getter()
    except (AttributeError, NotImplementedError):  # how models of transformers say they have none
        return None
    if layer is None:
        return None
    weight: torch.Tensor | None = getattr(original(layer), "weight", None)
    return weight
