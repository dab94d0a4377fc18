"""What the arguments of saves and loads come to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._folder import AdapterFolder
from peftstate._policy import Policy
from peftstate._signature import open_for_load
from peftstate._steps import Plan
from peftstate._storage import MANIFEST_NAME
from peftstate._warn import warn
from peftstate.errors import AdapterLoadError, ManifestNotFoundError, MissingManifestWarning
from peftstate.sections._probe import probe_inputs
from peftstate.sections._view import FINGERPRINTS, ModelView

if TYPE_CHECKING:
    import peft

    from peftstate._keys import TrustedKeys
    from peftstate._source import Source

HUB_ARGUMENTS = (
    "subfolder",
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
)
NOT_AN_ADAPTERS = frozenset(
    {
        "environment",
        "generation",
        "implementation",
        "predictions",
        "rng",
        "runtime",
        "tokenizer",
        "training",
    }
)
"""Sections that say nothing of one adapter in a model that has more."""
_OF_TRAINING = frozenset({"training", "rng"})
"""Sections that a load for inference leaves alone."""


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments among PEFT's further ones that say how to find a folder on the Hub."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def folder_with_manifest(
    model_id: str | os.PathLike[str],
    hub: Mapping[str, Any],
    *,
    require_manifest: bool,
    trusted_keys: TrustedKeys | None = None,
) -> AdapterFolder | None:
    """Open a folder; `None`, after a warning, if there is no manifest in it.

    With trusted keys that is left to who reads it: it must be signed, and with a manifest.

    Raises:
        ManifestNotFoundError: There is none, but one is required.
    """
    folder = open_for_load(model_id, trusted_keys=trusted_keys, **hub)
    if folder.trusted is not None or folder.exists(MANIFEST_NAME):
        return folder
    path = str(folder.path / MANIFEST_NAME)
    if require_manifest:
        raise ManifestNotFoundError(path)
    if folder.repo is not None:  # offline, the repo may have what the cache lacks
        path = f"{folder.repo.name} at commit {folder.commit}"
    where = "" if folder.repo is None else " in the Hub's cache"
    warn(
        f"{path}: there is no peftstate manifest{where}. The adapter is loaded as PEFT loads it; "
        "nothing of its state is verified or restored. Save it with peftstate to change that.",
        MissingManifestWarning,
    )
    return None


def plan_of(policy: Policy, source: Source, *, is_trainable: bool | None) -> Plan:
    """Which sections a load restores."""
    if is_trainable is False:
        return Plan(policy=policy, skipped=_OF_TRAINING)
    if is_trainable and not source.manifest.sections["training"].trains_adapter:
        return Plan(policy=policy, skipped=frozenset({"training"}))
    return Plan(policy=policy)


def is_trainable_in_peft(source: Source, policy: Policy, *, is_trainable: bool | None) -> bool:
    """What PEFT is told, which refuses to load prompts for training; `training` restores that."""
    if source.is_prompt_learning:
        return False
    if is_trainable is not None:
        return is_trainable
    saved: bool = source.manifest.sections["training"].trains_adapter
    return saved and policy.handles("training")


def live_names(source: Source, adapter_name: str) -> dict[str, str]:
    """The names of the adapters in the model: the folder's own gets the one that was asked for."""
    names = {name: name for name in source.adapters}
    names[source.own_adapter] = adapter_name
    if len(set(names.values())) < len(names):
        raise AdapterLoadError(
            "adapters",
            f"adapter_name={adapter_name!r} is also the name of another adapter in "
            f"{source.folder.path}; choose another one, or limit adapters=.",
        )
    return names


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what cannot be a tokenizer or a processor.

    Raises:
        TypeError: It is something else, such as a path.
    """
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            "tokenizer= takes a tokenizer or a processor of transformers, not a "
            f"{type(tokenizer).__name__}"
        )


def view_to_save(
    model: peft.PeftModel,
    selected: list[str] | None,
    *,
    fingerprint: str,
    tokenizer: Any,
    prediction_probe: Any,
    keep_merged_weights: bool = False,
) -> ModelView:
    """The view of what is saved.

    Raises:
        ValueError: There is no such adapter, no such fingerprint, or no such probe.
        TypeError: The tokenizer or the probe is something else.
    """
    if fingerprint not in FINGERPRINTS:
        raise ValueError(f"{fingerprint=} is none of {FINGERPRINTS}")
    check_tokenizer(tokenizer)
    view = ModelView.of(model, fingerprint=fingerprint)
    view = attrs.evolve(
        view,
        tokenizer=view.tokenizer if tokenizer is None else tokenizer,
        probe=probe_inputs(prediction_probe, view.base),
        keeps_merged=keep_merged_weights,
    )
    names = list(view.adapters) if selected is None else selected
    if unknown := [name for name in names if name not in view.adapters]:
        raise ValueError(
            f"You passed an invalid `selected_adapters` arguments, current supported adapter names "
            f"are {list(view.adapters)} - got {unknown}."
        )
    if not names:
        raise ValueError(
            "selected_adapters is empty, so there is nothing to save; leave it out to save all "
            f"adapters, or name some of {list(view.adapters)}."
        )
    return view.limited_to(names)
