"""The two models of a diagnosis, loaded: as they were saved, and as a user loads them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn

from peftstate._base_loading import NOT_THERE, load_base, not_to_be_had
from peftstate._calls import calling_peft
from peftstate._injection import readable_by_peft
from peftstate._models import PeftModel
from peftstate._rebuilding import base_model_kwargs, edits_of_config
from peftstate._source import Source
from peftstate.errors import AdapterLoadError, PeftStateWarning

if TYPE_CHECKING:
    from peftstate._keys import TrustedKeys


def exact_model(
    source: Source,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None,
    adapter_name: str,
    device: torch.device,
    trusted_keys: TrustedKeys | None,
    hub: Mapping[str, Any],
) -> PeftModel:
    """Reload the saved model, its base model included, in the state that it was saved in.

    Args:
        source: What was read from the adapter's folder.
        path: The folder, or the id of a repo.
        base: Where the base model is, if it is not where the adapter's config says.
        adapter_name: What the folder's own adapter is called in the model.
        device: Where the model goes.
        trusted_keys: As in `PeftModel.from_pretrained`.
        hub: Where the adapter is on the Hub.

    Raises:
        PeftStateError: There is no exact reload; the error says what differs.
    """
    with _only_errors():
        loaded = rebuilt_base(source, base, device)
        return PeftModel.from_pretrained(
            loaded, path, adapter_name, trusted_keys=trusted_keys, **hub
        )


def rebuilt_base(
    source: Source, base: str | os.PathLike[str] | None, device: torch.device
) -> nn.Module:
    """Load the base model as the manifest says: from where it was, else from where it is now.

    Raises:
        AdapterLoadError: It is in neither place.
    """
    config = source.adapters[source.own_adapter].config
    kwargs = base_model_kwargs(source.manifest)
    revision = kwargs.pop("revision", None)
    name = config.get("base_model_name_or_path") or base
    try:
        try:
            edits = edits_of_config(source.manifest, config, revision, {})
            return _load(source, name, device, **kwargs, **edits, **_revision(revision))
        except NOT_THERE:
            if base is None or name == base:
                raise
        name = os.fspath(base)
        edits = edits_of_config(source.manifest, {"base_model_name_or_path": name}, None, {})
        return _load(source, name, device, **kwargs, **edits)
    except NOT_THERE as error:
        raise not_to_be_had(name, error) from error


def users_model(
    source: Source, base: str | os.PathLike[str] | nn.Module | None, device: torch.device
) -> peft.PeftModel:
    """Load the model with plain PEFT, as its tutorials do.

    Args:
        source: What was read from the adapter's folder.
        base: The base model; what is none yet is loaded without any argument.
        device: Where the model goes.

    Raises:
        AdapterLoadError: The base model is not there, or PEFT cannot load the adapter onto it.
    """
    own = source.adapters[source.own_adapter]
    if not isinstance(base, nn.Module):
        name = base or own.config.get("base_model_name_or_path")
        try:
            base = _load(source, name, device, **_revision(own.config.get("revision")))
        except NOT_THERE as error:
            raise not_to_be_had(name, error) from error
    with calling_peft(), readable_by_peft(source, source.own_adapter) as folder:
        try:
            model: peft.PeftModel = peft.PeftModel.from_pretrained(base, folder)
        except (RuntimeError, ValueError, KeyError) as error:
            message = f"plain PEFT cannot load it ({type(error).__name__}: {error})"
            raise AdapterLoadError("adapters", message) from error
    return model


def _revision(revision: Any) -> dict[str, Any]:
    """The argument for a revision, if there is one."""
    return {} if revision is None else {"revision": revision}


def _load(source: Source, name: Any, device: torch.device, **kwargs: Any) -> nn.Module:
    """Load a base model; onto the CPU without a word of the device, as everybody does."""
    if device.type != "cpu":
        kwargs["device_map"] = {"": device}
    config = source.adapters[source.own_adapter].config
    return load_base(config, name, **kwargs)


@contextmanager
def _only_errors() -> Iterator[None]:
    """Keep warnings of ours back: what they tell is what is diagnosed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftStateWarning)
        yield
