"""`diagnose`: two models, and one forward pass for each thing in which they differ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn

from peftstate._api import view_of
from peftstate._diagnosing.measurement import Measurement
from peftstate._diagnosing.models import exact_model, rebuilt_base, users_model
from peftstate._diagnosing.pair import Pair
from peftstate._diagnosing.unmeasured import unmeasured
from peftstate._diagnosis import Diagnosis
from peftstate._signature import open_for_load
from peftstate._source import Source, read_source
from peftstate._steps import LOCK
from peftstate._tokenizer_files import CONFIG_NAME as TOKENIZER_CONFIG_NAME
from peftstate.sections import _generators

if TYPE_CHECKING:
    from peftstate._keys import TrustedKeys


def diagnose(
    source: str | os.PathLike[str],
    model: peft.PeftModel | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    as_plain_peft: bool = False,
    prediction_probe: Any = None,
    trusted_keys: TrustedKeys | None = None,
    **hub: Any,
) -> Diagnosis:
    """Find out why a model's predictions differ from those of the model that was saved.

    The saved model is reloaded by peftstate, which verifies it. Whatever the other model has that
    this one has not is then given to it, one thing at a time, and its logits are compared with what
    they were before: so each number says what one cause does, with all else as it was saved.

    There are two models in memory at a time. Both are left as they were, and so are the random
    generators.

    Args:
        source: The adapter's folder, or the id of a repo on the Hub. It must have a manifest.
        model: A live model that was loaded from it, to be diagnosed. By default one is loaded as
            tutorials do, by ``peft.PeftModel.from_pretrained(AutoModelFor….from_pretrained(base),
            source)``, which is what PEFT's auto classes do, too.
        base: The base model to load, without any further argument; by default the one that the
            adapter's config names. It also stands in for that one if it is not to be found.
        as_plain_peft: Load the base model as it was (quantization, dtype, attention) instead, so
            that only what PEFT itself loses is left.
        prediction_probe: Inputs to predict on, as `PeftModel.save_pretrained` takes them, or a
            text; by default the inputs that were saved, or else a fixed row of ids.
        trusted_keys: As in `PeftModel.from_pretrained`.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Returns:
        What differs and what it does.

    Raises:
        ManifestError: There is no manifest, or it cannot be used.
        IntegrityError: A file is not the one that was saved.
        SignatureError: The folder is not as the owner of a trusted key has signed it.
        StateMismatchError: There is no exact reload to compare with: the base model is another one,
            for instance.
        AdapterLoadError: A model cannot be loaded, or the saved one does not run.
        ValueError: A live model was passed with `as_plain_peft`, which loads one; or no inputs can
            be made up for the model.
    """
    if model is not None and as_plain_peft:
        raise ValueError("as_plain_peft=True loads a model, so none can be passed")
    with LOCK, _generators.kept():
        saved = read_source(open_for_load(source, trusted_keys=trusted_keys, **hub))
        device = _device(model)
        if model is None:
            given = rebuilt_base(saved, base, device) if as_plain_peft else base
            users = users_model(saved, given, device)
        else:
            users = model
        tokenizer = _tokenizer(saved, base) if model is None else None
        view, manifest = view_of(users, saved, tokenizer)
        others = unmeasured(view, manifest)
        exact = exact_model(
            saved,
            source,
            base=base,
            adapter_name=view.adapters.get(saved.own_adapter, "default"),
            device=device,
            trusted_keys=trusted_keys,
            hub=hub,
        )
        generators = _generators.Standing.now()  # which the load has put where they were saved
        pair = Pair.of(view_of(exact, saved, None)[0], view, manifest)
        if isinstance(prediction_probe, str):
            prediction_probe = _tokenized(saved, base, prediction_probe)
        measurement = Measurement.of(pair, prediction_probe, generators)
        causes, failed = measurement.causes()
        return Diagnosis(
            adapter=os.fspath(source),
            model=_in_words(model, as_plain_peft=as_plain_peft),
            inputs=measurement.words,
            failure=measurement.failure,
            total=measurement.total,
            rest=measurement.rest(),
            causes=causes,
            unmeasured=(*failed, *others),
        )


def _device(model: nn.Module | None) -> torch.device:
    """Where both models are: where the live one is, or where a quantized one is loaded to."""
    if model is not None:
        return next(model.parameters()).device
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _in_words(model: object, *, as_plain_peft: bool) -> str:
    """How the model that is diagnosed was loaded."""
    if model is not None:
        return "the live model"
    if as_plain_peft:
        return "plain PEFT on the base model as it was saved"
    return "plain PEFT on the base model as it is loaded by default"


def _tokenizer(source: Source, base: str | os.PathLike[str] | None) -> Any:
    """The tokenizer that a user loads beside the base model, if one was saved to compare with."""
    from transformers import AutoTokenizer

    name = base or source.adapters[source.own_adapter].config.get("base_model_name_or_path")
    if source.manifest.sections.get("tokenizer") is None or name is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):  # it has none, which is why it was saved with the adapter
        return None


def _tokenized(
    source: Source, base: str | os.PathLike[str] | None, text: str
) -> Mapping[str, torch.Tensor]:
    """A text as inputs, by the tokenizer in the adapter's folder, or else the base model's."""
    from transformers import AutoTokenizer

    is_beside = source.folder.exists(TOKENIZER_CONFIG_NAME)
    name = base or source.adapters[source.own_adapter].config.get("base_model_name_or_path")
    tokenizer = AutoTokenizer.from_pretrained(source.folder.path if is_beside else name)
    inputs: Mapping[str, torch.Tensor] = tokenizer(text, return_tensors="pt")
    return inputs
