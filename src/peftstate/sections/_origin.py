"""What of a base model its checkpoint gives, and what only the model in memory has.

A model that is wrapped by `peftstate.get_peft_model`, attached to, or loaded carries the digests
its base had then. What differs at the next save was trained, counted (BatchNorm) or rewritten (by
PiSSA and its kin), and no checkpoint has it. What was already so before cannot be seen by digests;
of that, what transformers initialised and did not find in the checkpoint is known by its mark.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from peftstate.sections._base_tensors import (
    BaseTensor,
    base_tensors,
    embedding_weight,
    records,
)
from peftstate.sections._bitsandbytes import dtype_quantized_from
from peftstate.sections._config_buffers import config_buffers, is_rounded
from peftstate.sections._tensors import TensorRecord, is_lossless, tensor_record

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftstate.sections._view import ModelView

_ATTRIBUTE = "_peftstate_origin"
_REWRITING = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""How the names of LoRA's initialisations that rewrite the base model's weights begin; see
`peft/tuners/lora/layer.py`."""


class _BaseRecord(Protocol):
    """What is needed of a `base_model.BaseModelRecord`."""

    @property
    def tensors(self) -> Mapping[str, TensorRecord]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def changed(self) -> tuple[str, ...]: ...
    @property
    def shadowed(self) -> tuple[str, ...]: ...


@attrs.frozen
class Origin:
    """The tensors of a base model as its checkpoint gave them, and buffers as its config did.

    Attributes:
        tensors: Their records; a tensor that is not among them is none of the checkpoint's.
        buffers: Records of the buffers; `None` of those that a load has put in the config's place.
        quantized_from: The names of the dtypes that 4-bit weights were quantized from.
    """

    tensors: Mapping[str, TensorRecord]
    buffers: Mapping[str, TensorRecord | None]
    quantized_from: Mapping[str, str | None]


def observe(view: ModelView) -> Origin:
    """Look at a base model before it is trained; it may be bare, or wrapped by somebody else."""
    view = view.now()
    found = base_tensors(view)
    new = _not_loaded(view, found) | _rewritten(view, found)
    known = {name: base for name, base in found.items() if name not in new and not base.replayed}
    return Origin(records(view, known), _described_buffers(view), _quantized_from(found))


def _quantized_from(found: Mapping[str, BaseTensor]) -> dict[str, str | None]:
    """The dtypes that 4-bit weights were quantized from, by the names of the weights."""
    return {
        name: dtype_quantized_from(base.owner.module)
        for name, base in found.items()
        if base.site is None and name == base.owner.name
    }


def _described_buffers(view: ModelView) -> dict[str, TensorRecord]:
    """The records of the buffers that the config gives."""
    return {name: tensor_record(site.tensor) for name, site in config_buffers(view).items()}


def keep(model: nn.Module, origin: Origin) -> None:
    """Have a PEFT model carry what was observed of its base."""
    setattr(model, _ATTRIBUTE, origin)


def of_loaded(view: ModelView, record: _BaseRecord, *, extra: Collection[str]) -> Origin:
    """What checkpoint and config gave of a model that was just loaded.

    Args:
        view: The model.
        record: The record that it was loaded with.
        extra: The names of the tensors of the base model that came from the sidecar.
    """
    put_back = {*record.changed, *record.shadowed}
    tensors = record.tensors if record.fingerprint == "full" else observe(view).tensors
    buffers = _described_buffers(view)
    return Origin(
        {name: tensor for name, tensor in tensors.items() if name not in put_back},
        {name: None if name in extra else buffer for name, buffer in buffers.items()},
        _quantized_from(base_tensors(view)),
    )


def changed(view: ModelView, tensors: Mapping[str, BaseTensor]) -> frozenset[str]:
    """The names of the base model's tensors that are not as the checkpoint gave them.

    What digests cannot tell (of a model that was never observed, or if they do not cover every
    byte) is told by what is trainable now, and by how the adapters began.

    Args:
        view: The model.
        tensors: What `base_tensors` gives of it; to make it takes the unpacking of 4-bit weights.
    """
    found = {name: base for name, base in tensors.items() if not base.shadowed}
    origin: Origin | None = getattr(view.model, _ATTRIBUTE, None)
    by_digest = origin is not None and view.fingerprint == "full"
    known = (origin or observe(view)).tensors
    now = records(view, found) if by_digest else {}
    rewritten = set() if by_digest else _rewritten(view, found)
    if origin is not None:
        rewritten |= _requantized(origin, found)

    def is_same(name: str, base: BaseTensor) -> bool:
        if base.replayed or name not in known or name in rewritten:
            return False
        return _is_same(base, now[name], known[name]) if by_digest else not _is_trainable(base)

    return frozenset(name for name, base in found.items() if not is_same(name, base))


def _requantized(origin: Origin, found: Mapping[str, BaseTensor]) -> set[str]:
    """The 4-bit weights that were quantized from another dtype, as a merge does, maybe to the same.

    Args:
        origin: How the weights were before.
        found: What `base_tensors` gives of the model.
    """
    before = origin.quantized_from
    now = _quantized_from(found)
    return {name for name in before.keys() & now.keys() if before[name] != now[name]}


def originals(view: ModelView, names: Collection[str]) -> dict[str, TensorRecord | None]:
    """What weights under adapters were before these rewrote them; `None` where nobody saw that."""
    origin: Origin | None = getattr(view.model, _ATTRIBUTE, None)
    known = origin.tensors if origin is not None else {}
    found = base_tensors(view)
    return {name: known.get(name) for name in names if _is_adapted(found[name])}


def lost(view: ModelView, tensors: Mapping[str, BaseTensor]) -> list[str]:
    """The names of the tensors that no file has and that no load would bring about.

    Args:
        view: The model.
        tensors: What `base_tensors` gives of it.
    """
    rewritten = is_rewritten(view)  # then merging starts from other weights
    return sorted(
        name
        for name in changed(view, tensors)
        if not tensors[name].replayed or (rewritten and tensors[name].owner.adapted)
    )


def lost_buffers(view: ModelView) -> list[str]:
    """The names of the buffers that the config would give otherwise, as far as that can be told.

    Not of those that are there since then or have another shape, as caches that a model fills.
    """
    origin: Origin | None = getattr(view.model, _ATTRIBUTE, None)

    def is_lost(name: str, buffer: torch.Tensor) -> bool:
        if origin is None:
            return is_rounded(buffer)
        if name not in origin.buffers:
            return False
        before = origin.buffers[name]
        if before is None or tuple(buffer.shape) != before.shape:
            return before is None
        return is_rounded(buffer) or tensor_record(buffer) != before

    found = config_buffers(view)
    return sorted(name for name, site in found.items() if is_lost(name, site.tensor))


def is_rewritten(view: ModelView) -> bool:
    """Whether one of a model's adapters began with rewriting the base model's weights."""
    return any(map(_rewrites_base, getattr(view.model, "peft_config", {}).values()))


def _rewrites_base(config: Any) -> bool:
    """Whether an adapter of a config begins with rewriting the base model's weights."""
    init = getattr(config, "init_lora_weights", None)
    return is_rewriting(init) or getattr(config, "kasa_config", None) is not None


def is_rewriting(init: Any) -> bool:
    """Whether a value of LoRA's `init_lora_weights` rewrites the base model's weights."""
    return isinstance(init, str) and init.lower().startswith(_REWRITING)


def _is_trainable(base: BaseTensor) -> bool:
    """Whether a tensor may have been trained."""
    return base.site is not None and base.site.tensor.requires_grad


def _is_same(base: BaseTensor, now: TensorRecord, before: TensorRecord) -> bool:
    """Whether a tensor has its old values, be it in another dtype that holds them all."""
    if now.digest is None or before.digest is None:  # nothing is known of the values
        return now.shape == before.shape
    if now == before:
        return True
    if now.shape != before.shape or now.dtype == before.dtype or not base.is_readable:
        return False
    return is_lossless(base.tensor, before.dtype) and (
        tensor_record(base.tensor, before.dtype) == before
    )


def _not_loaded(view: ModelView, found: Mapping[str, BaseTensor]) -> set[str]:
    """The tensors that transformers initialised since its checkpoint did not have them.

    transformers 5 marks what it loads (`modeling_utils.py::_is_hf_initialized`); a model without
    any mark was not loaded, or by an older version.
    """
    sites = {name: base.site for name, base in found.items() if base.site is not None}
    loaded = {name for name, site in sites.items() if _is_marked(site.tensor)}
    is_parameter = {name: site.leaf in site.module._parameters for name, site in sites.items()}
    fresh = {name for name in sites if loaded and is_parameter[name] and name not in loaded}
    resized = {id(weight) for weight in _resized(view.base)}
    return fresh | {name for name, site in sites.items() if id(site.tensor) in resized}


def _is_marked(tensor: Any) -> bool:
    """Whether transformers says that it loaded a tensor."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def _resized(base: Any) -> list[Any]:
    """The embeddings of a model that have other rows than it was built with.

    `resize_token_embeddings` changes the config and the outer model's `vocab_size`, not that of
    the model inside that holds the embeddings, which keeps the number it was built with.
    """
    embeddings = [embedding_weight(base, side) for side in ("input", "output")]
    built = [
        module.vocab_size
        for module in base.modules()
        if module is not base
        and isinstance(getattr(module, "vocab_size", None), int)
        and any(weight is embeddings[0] for weight in module.parameters())
    ]
    return [
        weight
        for weight in embeddings
        if weight is not None and built and weight.shape[0] != built[-1]
    ]


def _rewritten(view: ModelView, found: Mapping[str, BaseTensor]) -> set[str]:
    """The weights that an adapter's initialisation has rewritten already."""
    if not is_rewritten(view):
        return set()
    return {name for name, base in found.items() if _is_adapted(base)}


def _is_adapted(base: BaseTensor) -> bool:
    """Whether a tensor is a weight that an adapter applies to."""
    return base.owner.adapted and base.owner.leaf == "weight"
