"""`base_model`: which base model it is, down to the last bit.

PEFT records a name. What counts is the model in memory: its config, and the digest of every tensor
under the name it has without adapters, over the dtype it was saved in. Running the model does not
change the digests, loading it in another dtype does not either, where nothing was lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._diff import Json
from peftstate.errors import BaseModelMismatchError
from peftstate.sections import _bitsandbytes
from peftstate.sections._base import Section
from peftstate.sections._tensors import TensorRecord, in_threads, is_readable, tensor_record
from peftstate.sections._walk import is_peft_model

if TYPE_CHECKING:
    import torch

    from peftstate.sections._view import ModelView

NOT_IN_CONFIG = frozenset(
    {
        "_attn_implementation_autoset",  # a mark of transformers' own
        "_name_or_path",  # is `name`
        "architectures",  # is `model_class`
        "attn_implementation",  # is in `implementation`
        "dtype",  # what was asked for when loading; `dtype` records what is
        "experts_implementation",  # is in `implementation`
        "quantization_config",  # is in `quantization`
        "torch_dtype",  # the old name of `dtype`
        "transformers_version",  # is in `environment`
        "use_cache",  # is in `generation`
    }
)
"""Fields of a model's config that are no part of the record."""

RESTORED_CONFIG = frozenset(
    {
        "bos_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "id2label",
        "label2id",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "sep_token_id",
    }
)
"""Fields of a model's config that are put back: trainers edit them on the live model."""


@attrs.frozen(kw_only=True)
class BaseModelRecord:
    """The base model.

    Attributes:
        model_class: Name of the class, such as ``"Gemma3ForCausalLM"``.
        name: The repo id it was loaded from; of a local path the last component only.
        revision: The revision that was asked for, if any.
        commit: The commit of the Hub's repository, where the Hub cache tells.
        config: The fields of its config that say what it computes.
        load_dtype: Name of the dtype that it was asked to be loaded in, or `None`.
        tied_embeddings: Whether input and output embeddings are one tensor.
        fingerprint: What the digests cover: ``"full"``, ``"sampled"`` or ``"off"``.
        tensors: The tensors that checkpoints hold, 4-bit and 8-bit weights in canonical form.
        changed: Names of tensors that are not as the checkpoint gave them and are put back by a
            load (an adapter is merged into them), so that they are compared afterwards.
        shadowed: Names of tensors for which the adapter has a trained copy, which stands in for
            them, so that they need not be the same.
    """

    model_class: str
    name: str | None
    revision: str | None
    commit: str | None
    config: Mapping[str, Json]
    load_dtype: str | None
    tied_embeddings: bool
    fingerprint: str
    tensors: Mapping[str, TensorRecord]
    changed: tuple[str, ...]
    shadowed: tuple[str, ...]


def capture(view: ModelView) -> BaseModelRecord:
    """Read the config, and digest every tensor of the base model."""
    tensors = view.tensors()
    return _capture(
        view,
        fingerprint=view.fingerprint,
        changed={site.name for site in tensors if site.part == "base" and site.merged},
        shadowed={site.name for site in tensors if site.part == "base" and site.shadowed},
        like={},
        skipped=frozenset(),
    )


def capture_like(view: ModelView, record: BaseModelRecord) -> BaseModelRecord:
    """Capture for a comparison with a record: over its dtypes, as deep as it went.

    On a bare base model, what a load will yet change is left out.
    """
    bare = not is_peft_model(view.model)
    return _capture_again(view, record, skipped=frozenset(record.changed if bare else ()))


def capture_restored(view: ModelView, record: BaseModelRecord) -> BaseModelRecord:
    """Capture for a comparison after a load, for which the bare base model was compared already."""
    unchanged = record.tensors.keys() - set(record.changed)
    return _capture_again(view, record, skipped=frozenset(unchanged))


def _capture_again(
    view: ModelView, record: BaseModelRecord, *, skipped: frozenset[str]
) -> BaseModelRecord:
    """Capture in the way another record was captured.

    What says where the model came from is no evidence of what it is, so it is taken over from the
    record. So are fields of the config that only one of two transformers versions knows.
    """
    found = _capture(
        view,
        fingerprint=record.fingerprint,
        changed=set(record.changed),
        shadowed=set(record.shadowed),
        like=record.tensors,
        skipped=skipped,
    )
    return attrs.evolve(
        found,
        name=record.name,
        revision=record.revision,
        commit=record.commit,
        load_dtype=record.load_dtype,
        config={key: found.config.get(key, value) for key, value in record.config.items()},
    )


def _capture(
    view: ModelView,
    *,
    fingerprint: str,
    changed: set[str],
    shadowed: set[str],
    like: Mapping[str, TensorRecord],
    skipped: frozenset[str],
) -> BaseModelRecord:
    """Capture the base model.

    Args:
        view: The model.
        fingerprint: What the digests cover.
        changed: Names of the tensors that are not as the checkpoint gave them.
        shadowed: Names of the tensors that need no digest.
        like: Records of the same tensors, over whose dtypes they are digested.
        skipped: Names of tensors whose record is taken over from `like`, if they are there.
    """
    base = view.base
    config = getattr(base, "config", None)
    name = getattr(config, "_name_or_path", None) or None
    revision = _revision(view)
    tensors = dict(_tensors(view))

    def describe(name: str) -> TensorRecord:
        saved = like.get(name)
        if saved is not None and name in skipped:
            return saved
        return tensor_record(
            tensors[name],
            saved.dtype if saved is not None else None,
            sampled=fingerprint == "sampled",
            read=fingerprint != "off"
            and name not in shadowed
            and (saved is None or saved.digest is not None),
        )

    return BaseModelRecord(
        model_class=type(base).__name__,
        name=_portable(name),
        revision=revision,
        commit=_commit(name, revision),
        config=_fields(config),
        load_dtype=_load_dtype(config),
        tied_embeddings=_tied(base),
        fingerprint=fingerprint,
        tensors=dict(zip(tensors, in_threads(tensors, describe), strict=True)),
        changed=tuple(sorted(changed)),
        shadowed=tuple(sorted(shadowed)),
    )


def _tensors(view: ModelView) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a checkpoint of the base model holds.

    Quantized weights come in their canonical form, and tensors that are made of others (torchao's)
    as those others.
    """
    canonical: dict[int, Mapping[str, torch.Tensor]] = {}
    for name, module in view.base_modules():
        tensors = _bitsandbytes.canonical_tensors(module)
        if tensors is not None:
            canonical[id(module)] = tensors
            yield from ((f"{name}.{key}", value) for key, value in tensors.items())
    for site in view.tensors():
        if site.part != "base" or not site.persistent:
            continue
        if id(site.module) in canonical and site.leaf == "weight":
            continue
        yield from _plain(site.name, site.tensor)


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or the plain tensors that a subclass of it is made of."""
    if is_readable(tensor) and hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor


def _fields(config: Any) -> dict[str, Json]:
    """A model's config as JSON, without what is recorded elsewhere."""
    if not hasattr(config, "to_dict"):
        return {}
    fields: dict[str, Json] = json.loads(json.dumps(config.to_dict(), default=str))
    return _without_ignored(fields)


def _without_ignored(fields: dict[str, Json]) -> dict[str, Json]:
    """Drop the ignored fields of a config and of the configs in it."""
    return {
        key: _without_ignored(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in NOT_IN_CONFIG
    }


def _load_dtype(config: Any) -> str | None:
    """The dtype that transformers noted when it loaded the model."""
    value = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return None if value is None else str(value).removeprefix("torch.")


def _tied(base: torch.nn.Module) -> bool:
    """Whether input and output embeddings are one tensor."""
    if not (hasattr(base, "get_input_embeddings") and hasattr(base, "get_output_embeddings")):
        return False
    try:
        inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # a model of transformers without embeddings
        return False
    weight = getattr(inputs, "weight", None)
    return weight is not None and getattr(outputs, "weight", None) is weight


def _portable(name: str | None) -> str | None:
    """A repo id as it is; of a path only the last component, since folders are moved about."""
    if name is None or not (Path(name).is_absolute() or Path(name).exists()):
        return name
    return Path(name).name


def _revision(view: ModelView) -> str | None:
    """The revision of the base model that PEFT was told."""
    configs = getattr(view.model, "peft_config", {})
    revisions = (getattr(config, "revision", None) for config in configs.values())
    return next((revision for revision in revisions if revision), None)


def _commit(name: str | None, revision: str | None) -> str | None:
    """The commit of a model of the Hub, read off the cache's folder names."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).exists():
        return None
    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def restore(record: BaseModelRecord, view: ModelView) -> None:
    """Put back the fields of the config that trainers edit."""
    config = getattr(view.base, "config", None)
    if config is not None:
        _restore_config(record.config, config)


def _restore_config(saved: Mapping[str, Json], config: Any) -> None:
    """Set the restored fields of a config and of the configs in it."""
    found = _fields(config)
    for key in sorted(RESTORED_CONFIG & saved.keys() & found.keys()):
        if saved[key] != found[key]:
            setattr(config, key, _label_map(key, saved[key]))
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if inner is not None and isinstance(saved.get(key), Mapping):
            _restore_config(saved[key], inner)


def _label_map(key: str, value: Json) -> Json:
    """A value of a config as it is in memory: the keys of `id2label` are integers there."""
    if key == "id2label" and isinstance(value, Mapping):
        return {int(index): label for index, label in value.items()}
    return value


SECTION = Section(
    name="base_model",
    record=BaseModelRecord,
    capture=capture,
    capture_like=capture_like,
    capture_restored=capture_restored,
    restore=restore,
    restored=RESTORED_CONFIG,
    checked_on_base=True,
    error=BaseModelMismatchError,
)
