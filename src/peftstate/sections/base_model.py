"""`base_model`: which base model it is, down to the last bit.

PEFT records a name. What counts is the model in memory: its config, and the digest of every tensor
under the name it has without adapters, over the dtype it was saved in. Running the model does not
change the digests, loading it in another dtype does not either, where nothing was lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._diff import Json
from peftstate._progress import progress
from peftstate._warn import warn
from peftstate.errors import BaseModelMismatchError, StateMismatchWarning
from peftstate.sections import _origin
from peftstate.sections._base import Section
from peftstate.sections._base_tensors import (
    SCALES,
    BaseTensor,
    Digests,
    base_tensors,
    described_in_threads,
    embedding_weight,
    records,
)
from peftstate.sections._hub_cache import cached_checkpoint
from peftstate.sections._model_config import (
    RESTORED_CONFIG,
    TOKEN_IDS,
    config_fields,
    restore_config,
)
from peftstate.sections._peft_layers import replicated_layers
from peftstate.sections._remote_code import remote_code
from peftstate.sections._tensors import TensorRecord, tensor_record
from peftstate.sections._walk import is_peft_model

if TYPE_CHECKING:
    import torch

    from peftstate.sections._view import ModelView


@attrs.frozen(kw_only=True)
class BaseModelRecord:
    """The base model.

    Attributes:
        model_class: Name of the class, such as ``"Gemma3ForCausalLM"``.
        name: The repo id it was loaded from; of a local path the last component only.
        revision: The revision that was asked for, if any.
        commit: The commit of the Hub's repository, where the Hub cache tells.
        files: The files with the weights that the Hub's cache has of that commit: name → SHA-256 as
            the cache states it, or `None` where it does not. No byte of them is read: the digests
            of the tensors decide what the model is.
        config: The fields of its config that say what it computes.
        load_dtype: Name of the dtype that it was asked to be loaded in, or `None`.
        tied_embeddings: Whether input and output embeddings are one tensor.
        remote_code: The Python files that the checkpoint brought with it and that its classes came
            from, with all that they import from beside them: name → SHA-256, or `None` if a file
            could not be read any more. `None` for all if it is not known (schema 1).
        fingerprint: What the digests cover: ``"full"``, ``"sampled"`` or ``"off"``.
        tensors: The tensors that checkpoints hold, 4-bit and 8-bit weights in canonical form.
        changed: Names of tensors that are not as the checkpoint gave them. A load puts them back
            (from the sidecar, or by merging an adapter again) and compares them afterwards.
        shadowed: Names of tensors for which the adapter has a trained copy, which stands in for
            them, so that they need not be the same.
    """

    model_class: str
    name: str | None
    revision: str | None
    commit: str | None
    files: Mapping[str, str | None]
    config: Mapping[str, Json]
    load_dtype: str | None
    tied_embeddings: bool
    remote_code: Mapping[str, str | None] | None
    fingerprint: str
    tensors: Mapping[str, TensorRecord]
    changed: tuple[str, ...]
    shadowed: tuple[str, ...]

    def with_original(self, tensors: Mapping[str, TensorRecord | None]) -> BaseModelRecord:
        """The record, with tensors as they were before they were changed, where that is known."""
        described = {
            name: attrs.evolve(record, digest=None) if name in tensors else record
            for name, record in self.tensors.items()
        }
        described |= {name: record for name, record in tensors.items() if record is not None}
        return attrs.evolve(
            self,
            tensors=described,
            changed=tuple(sorted(set(self.changed) - tensors.keys())),
        )

    def with_shadowed(self, names: Collection[str]) -> BaseModelRecord:
        """The record, after more tensors turned out to be saved with an adapter."""
        tensors = {
            name: attrs.evolve(tensor, digest=None) if name in names else tensor
            for name, tensor in self.tensors.items()
        }
        return attrs.evolve(
            self,
            tensors=tensors,
            changed=tuple(sorted(set(self.changed) - set(names))),
            shadowed=tuple(sorted({*self.shadowed, *names})),
        )


def capture(view: ModelView) -> BaseModelRecord:
    """Read the config, and digest every tensor of the base model."""
    tensors = base_tensors(view)
    return _describe(
        view,
        fingerprint=view.fingerprint,
        tensors=records(view, tensors),
        changed=_origin.changed(view, tensors),
        shadowed={name for name, base in tensors.items() if base.shadowed},
    )


def capture_like(view: ModelView, record: BaseModelRecord) -> BaseModelRecord:
    """Capture for a comparison with a record: over its dtypes, as deep as it went.

    On a bare base model, what a load will yet change is left out.
    """
    skipped = _put_back(view, record) if not is_peft_model(view.model) else set()
    return _capture_again(view, record, skipped=frozenset(skipped))


def _put_back(view: ModelView, record: BaseModelRecord) -> set[str]:
    """The names of the tensors that a load changes, and of embeddings that it resizes."""
    embeddings = [embedding_weight(view.base, "input"), embedding_weight(view.base, "output")]
    found = base_tensors(view).items()
    sites = {name: base.site for name, base in found if base.site is not None}
    resized = {
        name for name, site in sites.items() if any(site.tensor is item for item in embeddings)
    }
    return {*record.changed, *(resized & set(record.shadowed))}


def capture_restored(view: ModelView, record: BaseModelRecord) -> BaseModelRecord:
    """Capture for a comparison after a load, for which the bare base model was compared already."""
    unchanged = record.tensors.keys() - set(record.changed)
    return _capture_again(view, record, skipped=frozenset(unchanged))


def _capture_again(
    view: ModelView, record: BaseModelRecord, *, skipped: frozenset[str]
) -> BaseModelRecord:
    """Capture in the way another record was captured.

    What says where the model came from is no evidence of what it is, so it is taken over from the
    record; but where tensors differ, another commit tells why. Fields of the config that only one
    of two transformers versions knows are taken over, too.

    Args:
        view: The model.
        record: The other record, over whose dtypes the tensors are digested.
        skipped: Names of tensors that are taken over from it, if they are there.
    """
    tensors = {
        name: base
        for name, base in base_tensors(view).items()
        if name in record.tensors or SCALES not in name
    }
    skipped = (skipped | view.known) & record.tensors.keys()
    unreadable = _unreadable(tensors, record, skipped)
    in_full = record.fingerprint == "full"

    def describe(name: str, digests: Digests) -> TensorRecord:
        saved = record.tensors.get(name)
        if saved is not None and name in unreadable:
            return attrs.evolve(saved, shape=tuple(tensors[name].tensor.shape))
        if saved is None or saved.digest is None:
            dtype = None if saved is None else saved.dtype
            return tensor_record(tensors[name].tensor, dtype, read=False)
        return digests.record(tensors[name], saved.dtype, sampled=not in_full)

    wanted = {name: base for name, base in tensors.items() if name not in skipped}
    with progress("Comparing the base model", len(wanted), "tensors") as reach:
        described = described_in_threads(wanted, describe, reach, remembers=view.looks is not None)
    if view.looks is not None and in_full:
        view.looks.note(described.items())
    described |= {name: record.tensors[name] for name in tensors if name in skipped}
    found = _describe(
        view,
        fingerprint=record.fingerprint,
        tensors=described,
        changed=record.changed,
        shadowed=record.shadowed,
    )
    differs = dict(found.tensors) != dict(record.tensors)
    source = found if differs and found.commit and record.commit else record
    return attrs.evolve(
        found,
        name=record.name,
        revision=record.revision,
        commit=source.commit,
        files=source.files,
        load_dtype=record.load_dtype,
        remote_code=None if record.remote_code is None else found.remote_code,
        config={key: found.config.get(key, value) for key, value in record.config.items()},
    )


_SHOWN = 8
"""Names that a warning lists."""


def _unreadable(
    tensors: Mapping[str, BaseTensor], record: BaseModelRecord, skipped: Collection[str]
) -> set[str]:
    """The tensors that cannot be compared in this process, of which a warning tells."""
    names = {
        name
        for name, saved in record.tensors.items()
        if saved.digest is not None
        and name not in skipped
        and name in tensors
        and not tensors[name].is_readable
    }
    if names:
        shown = sorted(names)[:_SHOWN] + (["…"] if len(names) > _SHOWN else [])
        warn(
            f"{len(names)} of {len(tensors)} tensors of the base model cannot be read in this "
            "process (they are offloaded, or shards), so they were not compared: "
            f"{', '.join(shown)}",
            StateMismatchWarning,
        )
    return names


def _describe(
    view: ModelView,
    *,
    fingerprint: str,
    tensors: Mapping[str, TensorRecord],
    changed: Collection[str],
    shadowed: Collection[str],
) -> BaseModelRecord:
    """The record of a base model, whose tensors were looked at already."""
    base = view.base
    config = getattr(base, "config", None)
    name = getattr(config, "_name_or_path", None) or None
    revision = _revision(view)
    checkpoint = cached_checkpoint(config, revision)
    return BaseModelRecord(
        model_class=type(base).__name__,
        name=_portable(name),
        revision=revision,
        commit=checkpoint.commit,
        files=checkpoint.files,
        config=_fields_of_bare(view, config),
        load_dtype=_load_dtype(config),
        tied_embeddings=_tied(base),
        remote_code=remote_code(view),
        fingerprint=fingerprint,
        tensors=tensors,
        changed=tuple(sorted(changed)),
        shadowed=tuple(sorted(shadowed)),
    )


def _fields_of_bare(view: ModelView, config: Any) -> dict[str, Json]:
    """The fields of a model's config that say the same of the bare model."""
    fields = config_fields(config)
    if replicated_layers(view.model) is not None:  # PEFT writes its own number of layers there
        fields.pop("num_hidden_layers", None)
    return fields


def _load_dtype(config: Any) -> str | None:
    """The dtype that transformers noted when it loaded the model."""
    value = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return None if value is None else str(value).removeprefix("torch.")


def _tied(base: torch.nn.Module) -> bool:
    """Whether input and output embeddings are one tensor."""
    inputs = embedding_weight(base, "input")
    return inputs is not None and inputs is embedding_weight(base, "output")


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


def as_live(record: BaseModelRecord, view: ModelView) -> BaseModelRecord:
    """The record with the live special ids, which the trainer of one adapter may have edited."""
    config = getattr(view.base, "config", None)
    known = {key for key in TOKEN_IDS & record.config.keys() if hasattr(config, key)}
    edited = {
        key: value for key in sorted(known) if (value := getattr(config, key)) != record.config[key]
    }
    if not edited:
        return record
    saved = {key: record.config[key] for key in edited}
    warn(
        f"The adapter was saved with {saved} in the base model's config, where the live model has "
        f"{edited}, which stays so.",
        StateMismatchWarning,
    )
    return attrs.evolve(record, config={**record.config, **edited})


def prepare(record: BaseModelRecord, view: ModelView) -> None:
    """Resize the embeddings, if a load will put saved ones in their place."""
    base = view.base
    inputs = embedding_weight(base, "input")
    if inputs is None:
        return
    names = [site.name for site in view.tensors() if site.part == "base" and site.tensor is inputs]
    restored = {*record.changed, *record.shadowed}
    known = restored & record.tensors.keys()
    rows = [record.tensors[name].shape[0] for name in names if name in known]
    if rows and rows[0] != inputs.shape[0]:
        if view.saved_shapes is not None and (rows[0], *inputs.shape[1:]) not in view.saved_shapes:
            raise ValueError(f"embeddings of {rows[0]} rows, which are in no file that was saved")
        base.resize_token_embeddings(rows[0], mean_resizing=False)
        view.changed()


def restore(record: BaseModelRecord, view: ModelView) -> None:
    """Put back the fields of the config that trainers edit."""
    config = getattr(view.base, "config", None)
    if config is not None:
        restore_config(record.config, config)


SECTION = Section(
    name="base_model",
    record=BaseModelRecord,
    capture=capture,
    capture_like=capture_like,
    capture_restored=capture_restored,
    restore=restore,
    prepare=prepare,
    restored=RESTORED_CONFIG | {"vocab_size"},
    checked_on_base=True,
    error=BaseModelMismatchError,
)
