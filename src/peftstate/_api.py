"""Capture, verify and restore on a live PEFT model."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import attrs
import peft
from torch import nn

from peftstate._arguments import check_tokenizer
from peftstate._injection import set_tensors
from peftstate._loading import for_adapters, undone_on_failure
from peftstate._log import tell
from peftstate._policy import OnMismatch, Policy
from peftstate._report import Report
from peftstate._reproducible import keep_process
from peftstate._saving import capture_sections
from peftstate._signature import open_for_load
from peftstate._source import Source, read_source
from peftstate._steps import (
    LOCK,
    Plan,
    check_base,
    compare,
    compare_restored,
    prepare_base,
    restore_sections,
)
from peftstate.manifest import Manifest
from peftstate.sections._view import ModelView
from peftstate.sections.predictions import inputs_of
from peftstate.sections.tokenizer import put_back_on_failure

if TYPE_CHECKING:
    from peftstate._keys import TrustedKeys


def capture(model: nn.Module, *, fingerprint: str = "full", tokenizer: Any = None) -> Manifest:
    """Describe the state of a PEFT model, as a save would, without writing anything.

    Args:
        model: The model. It is left as it is, and no random number is drawn.
        fingerprint: What the digests of the base model cover: ``"full"``, ``"sampled"``, ``"off"``.
        tokenizer: The tokenizer, or the processor, that goes with the model; by default the one
            that it was attached, loaded or trained with.

    Returns:
        A manifest that names no files.
    """
    view = _with_tokenizer(ModelView.of(model, fingerprint=fingerprint), tokenizer)
    return Manifest(sections=capture_sections(view), files={})


def verify(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    trusted_keys: TrustedKeys | None = None,
    **hub: Any,
) -> Report:
    """Compare a live PEFT model with what was saved.

    Args:
        model: The model. It is left as it is.
        source: The adapter's folder, or the id of a repo on the Hub.
        tokenizer: As in `capture`.
        trusted_keys: As in `PeftModel.from_pretrained`.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Returns:
        Everything that differs. A difference is no exception; see `Report.raise_for_mismatch`.

    Raises:
        ManifestError: The manifest cannot be used.
        IntegrityError: A file is not the one that was saved.
        SignatureError: The folder is not as the owner of a trusted key has signed it.
    """
    with LOCK:
        saved = read_source(open_for_load(source, trusted_keys=trusted_keys, **hub))
        view, manifest = view_of(model, saved, tokenizer)
        plan = Plan(policy=Policy.of(None))
        return compare(view, manifest, plan, lambda section: section.capture_like)


def restore(
    model: peft.PeftModel,
    source: str | os.PathLike[str],
    *,
    on_mismatch: OnMismatch | None = None,
    tokenizer: Any = None,
    trusted_keys: TrustedKeys | None = None,
    **hub: Any,
) -> Report:
    """Bring a live PEFT model into the state that was saved.

    Args:
        model: The model, which must have the saved adapters. If it fails, it is as it was before.
        source: The adapter's folder, or the id of a repo on the Hub.
        on_mismatch: As in `PeftModel.from_pretrained`.
        tokenizer: As in `capture`. If it fails, it is as it was before, too.
        trusted_keys: As in `PeftModel.from_pretrained`.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Returns:
        What still differs, which `on_mismatch` has made a warning or nothing.

    Raises:
        ManifestError: The manifest cannot be used.
        IntegrityError: A file is not the one that was saved.
        SignatureError: The folder is not as the owner of a trusted key has signed it.
        StateMismatchError: Something differs that cannot be restored.
        RestoreError: Some state cannot be set.
    """
    plan = Plan(policy=Policy.of(on_mismatch))
    with LOCK:
        began = time.perf_counter()
        saved = read_source(open_for_load(source, trusted_keys=trusted_keys, **hub))
        view, manifest = view_of(model, saved, tokenizer)
        check_base(ModelView(model=view.base, tokenizer=view.tokenizer), manifest, plan)

        def steps() -> Report:
            prepare_base(view, manifest, plan)
            set_tensors(view, saved.adapters, manifest, plan)
            restore_sections(view, manifest, plan)
            return compare_restored(view, manifest, plan)

        with put_back_on_failure(view):
            report = undone_on_failure(model, steps, keep_rng=False)
        keep_process(model, saved.manifest)
        tell("restored", saved.folder.path, manifest, since=began, sections=report.sections)
        return report


def _with_tokenizer(view: ModelView, tokenizer: Any) -> ModelView:
    """The view, with a tokenizer if one was passed."""
    check_tokenizer(tokenizer)
    return view if tokenizer is None else attrs.evolve(view, tokenizer=tokenizer)


def view_of(model: nn.Module, saved: Source, tokenizer: Any) -> tuple[ModelView, Manifest]:
    """The view of a live model that fits a manifest, and the manifest for it.

    The folder's own adapter may have another name in the model, if it is the only one there.
    """
    records = saved.manifest.sections["adapters"].adapters
    live = list(getattr(model, "peft_config", ()))
    names = {name: name for name in records}
    if saved.own_adapter not in live and len(records) == len(live) == 1:
        names = {saved.own_adapter: live[0]}
    present = {name: live_name for name, live_name in names.items() if live_name in live}
    manifest = for_adapters(saved.manifest, names)
    view = attrs.evolve(
        ModelView.of(model),
        adapters=present,
        folders={name: records[name].folder for name in present},
        probe=inputs_of(manifest.sections.get("predictions")),
    )
    return _with_tokenizer(view, tokenizer), manifest
