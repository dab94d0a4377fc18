"""Loading a base model with the class that its adapter's config names, as PEFT does."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import peft
from huggingface_hub.errors import HFValidationError
from torch import nn

from peftstate import _auto
from peftstate._peft_config import refuse_base_class
from peftstate.errors import AdapterLoadError

NOT_THERE = (OSError, HFValidationError)
"""What transformers raises over a folder that is gone; some versions take its path for a repo."""


def load_base(config: Mapping[str, Any], name: Any, **kwargs: Any) -> nn.Module:
    """Load a base model.

    Args:
        config: The adapter's config.
        name: The base model, a folder or a repo.
        **kwargs: What its `from_pretrained` takes.

    Raises:
        AdapterLoadError: The config names no class to load it with, or one that is refused.
    """
    model: nn.Module = _base_class(config).from_pretrained(name, **kwargs)
    return model


def _base_class(config: Mapping[str, Any]) -> Any:
    """The class that PEFT's auto classes load a base model with.

    Raises:
        AdapterLoadError: The adapter's config names none, or one that is refused.
    """
    refuse_base_class(config, None)
    task, mapping = config.get("task_type"), config.get("auto_mapping")
    wanted = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task) if isinstance(task, str) else None
    for auto in _auto.CLASSES.values():
        if wanted is not None and auto._target_peft_class.__name__ == wanted.__name__:
            return auto._target_class
    if task is None and mapping:
        return getattr(
            importlib.import_module(mapping["parent_library"]), mapping["base_model_class"]
        )
    raise AdapterLoadError(
        "base_model", "its config does not say with which class its base model is loaded"
    )


def not_to_be_had(name: object, error: Exception) -> AdapterLoadError:
    """The error for a base model that is not where it is said to be."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    message = f"its base model {name!r} is not to be had ({reason}); pass base= to say where it is"
    return AdapterLoadError("base_model", message)
