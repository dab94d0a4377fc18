"""Quantization configs in manifests: of any method to JSON, of bitsandbytes back again."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from peftstate._diff import Json
from peftstate.sections._tensors import dtype_named

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_MODULE = re.compile(r"[\w.-]*\*?")
"""A module's name, or its beginning: transformers takes it as a pattern
(`transformers/quantizers/quantizers_utils.py::should_convert_module`), of which some take hours."""
_DTYPES = ("bfloat16", "float16", "float32")
_STORAGE_DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "uint8")


def of_model(model: Any) -> dict[str, Json] | None:
    """The quantization config of a model as JSON; `None` if it has none."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if config is None:
        return None
    fields: dict[str, Json] = to_json(config)
    return fields


def to_json(value: Any) -> Json:
    """A quantization config, or a value in one, as JSON: equal configs give equal JSON.

    Dtypes and enums become their names, sets are sorted, private fields are left out. Of an
    object that does not say what it holds (a tokenizer to calibrate with) the class is kept.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        fields = {str(to_json(key)): to_json(item) for key, item in value.items()}
        return {key: fields[key] for key in sorted(fields) if not key.startswith("_")}
    if isinstance(value, set | frozenset):
        value = sorted(map(to_json, value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return _object_to_json(value)


def _object_to_json(value: Any) -> Json:
    """An object that is neither a JSON value nor made of them."""
    import torch

    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if isinstance(value, type):
        return value.__qualname__
    if callable(getattr(value, "to_dict", None)):
        return to_json(value.to_dict())
    if dataclasses.is_dataclass(value):
        return {"class": type(value).__qualname__, **to_json(vars(value))}
    return getattr(value, "__qualname__", type(value).__qualname__)


def _is_bool(value: Json) -> bool:
    """Whether a field's value is a flag."""
    return isinstance(value, bool)


def _is_number(value: Json) -> bool:
    """Whether a field's value is a number with a fraction."""
    return isinstance(value, float)


def _is_names(value: Json) -> bool:
    """Whether a field's value is a list of names, or none."""
    return value is None or (
        isinstance(value, list)
        and all(isinstance(item, str) and _MODULE.fullmatch(item) for item in value)
    )


def _one_of(*names: str) -> Callable[[Json], bool]:
    """A check that a field's value is one of some names."""
    return lambda value: isinstance(value, str) and value in names


BITSANDBYTES_FIELDS: Mapping[str, Callable[[Json], bool]] = {
    "load_in_8bit": _is_bool,
    "load_in_4bit": _is_bool,
    "llm_int8_threshold": _is_number,
    "llm_int8_skip_modules": _is_names,
    "llm_int8_enable_fp32_cpu_offload": _is_bool,
    "llm_int8_has_fp16_weight": _is_bool,
    "bnb_4bit_compute_dtype": _one_of(*_DTYPES),
    "bnb_4bit_quant_type": _one_of("fp4", "nf4"),
    "bnb_4bit_use_double_quant": _is_bool,
    "bnb_4bit_quant_storage": _one_of(*_STORAGE_DTYPES),
}
"""The arguments of `BitsAndBytesConfig` that a manifest may set, and to which values."""

_DTYPE_FIELDS = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def bitsandbytes_config(fields: Mapping[str, Json]) -> BitsAndBytesConfig:
    """Make the config of bitsandbytes that was recorded.

    Raises:
        ValueError: A field is none of `BITSANDBYTES_FIELDS`, or its value is not allowed.
    """
    from transformers import BitsAndBytesConfig

    arguments: dict[str, Any] = {}
    for name, value in fields.items():
        if (name, value) == ("quant_method", "bitsandbytes"):
            continue
        if name not in BITSANDBYTES_FIELDS or not BITSANDBYTES_FIELDS[name](value):
            raise ValueError(
                f"the manifest's quantization config has {name}={value!r}, which is not set from "
                "a manifest; pass quantization_config= as it was passed when training"
            )
        # transformers looks a name up among all of torch's attributes, so it gets the dtype itself
        arguments[name] = dtype_named(value) if name in _DTYPE_FIELDS else value
    return BitsAndBytesConfig(**arguments)
