"""A PEFT config as a manifest has it: in one form only, whoever wrote it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._diff import Json

if TYPE_CHECKING:
    from peft import PeftConfig

NOT_IN_CONFIG = frozenset(
    {
        "auto_mapping",  # set by PEFT while it writes
        "base_model_name_or_path",  # where it was found, not what it is
        "inference_mode",  # is in `training`; PEFT writes true whatever it was
        "lora_B_layout",  # Unsloth's mark of fused experts, which PEFT passes over
        "peft_version",  # is in `environment`
        "revision",  # is in `base_model`
        "runtime_config",  # how to load, not what
        "unsloth_fused_expert_lora",  # likewise Unsloth's
    }
)
"""Fields of a PEFT config that are no part of the record."""


_SET_BY_XLORA = ("global_scaling_weight", "scaling_pass_value", "top_k_lora")
"""Fields that methods of X-LoRA's model set, which say that they set them in the config
(`peft/tuners/xlora/model.py::XLoraModel.set_topk_lora`); they do in a copy, the classifier's."""


def config_of(model: Any, adapter: str) -> PeftConfig:
    """The config of an adapter of a model, with what was set on the model since."""
    config: PeftConfig = model.peft_config[adapter]
    if config.peft_type != "XLORA":
        return config
    config = copy.copy(config)
    for name in _SET_BY_XLORA:
        setattr(config, name, getattr(model.base_model.internal_xlora_classifier.config, name))
    return config


@contextmanager
def completed_configs(model: Any) -> Iterator[None]:
    """Have PEFT write the configs of a model's adapters with what was set on the model since."""
    configs: dict[str, PeftConfig] = model.peft_config
    before = configs.copy()
    configs.update({adapter: config_of(model, adapter) for adapter in before})
    try:
        yield
    finally:
        configs.update(before)


def config_fields(config: PeftConfig) -> dict[str, Json]:
    """A PEFT config as JSON in one form only, sets in sorted order."""
    return canonical_fields(config.to_dict())


def canonical_fields(config: Mapping[str, Any]) -> dict[str, Json]:
    """The fields of a PEFT config that say what the adapter is, from memory or from its file."""
    fields: dict[str, Json] = json.loads(json.dumps(dict(config), default=_jsonable))
    return {
        key: sorted(set(value)) if key in _SETS and _is_of_names(value) else value
        for key, value in fields.items()
        if key not in NOT_IN_CONFIG
    }


_SETS = frozenset(
    {
        "exclude_modules",
        "feedforward_modules",
        "modules_to_save",
        "target_modules",
        "target_parameters",
    }
)
"""Fields that PEFT holds as sets and writes in random order."""


def _is_of_names(value: Json) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _jsonable(value: Any) -> Json:
    """What `json` does not know of a PEFT config: sets, enums, dtypes, nested configs."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if attrs.has(type(value)) or hasattr(value, "__dataclass_fields__"):
        return dict(vars(value))
    return str(value)
