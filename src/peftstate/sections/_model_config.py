"""The config of a base model: which fields are recorded, and which are set again.

A field is set on a live model only where no tensor and no layer was made from it; the others must
be set before a model is built. Both are closed tables, for whoever writes a manifest must not get
at fields that choose code: ``auto_map``, a kernel's repository, a quantization method.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peftstate._diff import Json

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

TOKEN_IDS = frozenset(key for key in RESTORED_CONFIG if key.endswith("_token_id"))
"""Of these, what a model has one of for all its adapters."""

BUILT_CONFIG = RESTORED_CONFIG | {
    "activation_function",
    "attention_dropout",
    "attention_multiplier",
    "attention_probs_dropout_prob",
    "attn_logit_softcapping",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "embedding_multiplier",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "hidden_dropout",
    "hidden_dropout_prob",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "logit_scale",
    "logits_scaling",
    "max_window_layers",
    "norm_epsilon",
    "norm_topk_prob",
    "num_experts_per_tok",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "resid_pdrop",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "use_sliding_window",
}
"""Fields that an auto class hands to the base model that it builds: numbers, names from tables of
transformers' own, settings of the rotary embedding, labels. Of these only the number of labels is
the size of a tensor, of a head that the checkpoint need not have."""
_SET_AFTERWARDS = frozenset({"pad_token_id"})
"""Fields that are edited on a model which was built without them, and left to `restore_config`. An
embedding gives no gradient to the row of its padding, and refuses one beyond its size, which may be
that of a token added later."""
_KINDS = ((str,), (bool,), (int, float), (list,), (dict,))
"""Types of JSON values, those together that stand for one another."""


def config_fields(config: Any) -> dict[str, Json]:
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


def restore_config(saved: Mapping[str, Json], config: Any) -> None:
    """Set the restored fields of a config and of the configs in it."""
    found = config_fields(config)
    for key in sorted(RESTORED_CONFIG & saved.keys() & found.keys()):
        if saved[key] != found[key]:
            _check_value(key, saved[key])
            setattr(config, key, _label_map(key, saved[key]))
    for key, inner in _inner_configs(config):
        if isinstance(saved.get(key), Mapping):
            restore_config(saved[key], inner)


def _check_value(key: str, value: Json) -> None:
    """Refuse a value that no model of transformers has in a field of `RESTORED_CONFIG`.

    Raises:
        ValueError: It is one.
    """
    if not _ALLOWED[key](value):
        raise ValueError(f"the config's {key} cannot be {reprlib.repr(value)}")


def _is_id(value: Json) -> bool:
    """Whether a value is the id of a token, or none."""
    return value is None or (type(value) is int and -(2**31) <= value < 2**31)


def _is_ids(value: Json) -> bool:
    """Whether a value is the id of a token, several, or none."""
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_label_map(value: Json) -> bool:
    """Whether a value maps labels, or their ids, to the other; a head has a row for each."""
    return value is None or (
        isinstance(value, Mapping)
        and len(value) <= MAX_LABELS
        and all(isinstance(item, (str, int)) for item in value.values())
    )


_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
MAX_SLICES = 64
"""Parts in which a Llama multiplies its weights (`pretraining_tp`), as when it was trained."""
MAX_LABELS = 2**15
"""Labels of a classifier; ImageNet's large set has 21,843."""
_ALLOWED: Mapping[str, Callable[[Json], bool]] = {
    "bos_token_id": _is_ids,
    "decoder_start_token_id": _is_ids,
    "eos_token_id": _is_ids,
    "id2label": _is_label_map,
    "label2id": _is_label_map,
    "pad_token_id": _is_ids,
    "pretraining_tp": lambda value: type(value) is int and 1 <= value <= MAX_SLICES,
    "problem_type": lambda value: value is None or value in _PROBLEMS,
    "sep_token_id": _is_ids,
}
"""The values that a manifest may put into each field of `RESTORED_CONFIG`."""


def _label_map(key: str, value: Json) -> Json:
    """A value of a config as it is in memory: the keys of `id2label` are integers there."""
    if key == "id2label" and isinstance(value, Mapping):
        return {int(index): label for index, label in value.items()}
    return value


def config_edits(saved: Mapping[str, Json], config: Any) -> dict[str, Json]:
    """What to hand to ``from_pretrained`` so that a config becomes the saved one.

    Args:
        saved: The recorded fields.
        config: The config as the checkpoint has it.

    Returns:
        The fields to build a model with that differ; those of a config in it in a dictionary.
    """
    found = config_fields(config)
    edits = {
        key: _label_map(key, saved[key])
        for key in sorted((BUILT_CONFIG - _SET_AFTERWARDS) & saved.keys() & found.keys())
        if saved[key] != found[key]
        and _are_alike(saved[key], found[key])
        and (key not in _ALLOWED or _ALLOWED[key](saved[key]))
    }
    for key, inner in _inner_configs(config):
        value = saved.get(key)
        if isinstance(value, Mapping) and (below := config_edits(value, inner)):
            edits[key] = below
    return edits


def _are_alike(saved: Json, found: Json) -> bool:
    """Whether one value can stand for another, so that building a model does not choke on it."""
    kinds = {type(saved), type(found)} - {type(None)}
    return any(kinds <= set(kind) for kind in _KINDS)


def _inner_configs(config: Any) -> Iterator[tuple[str, Any]]:
    """The configs in a config, by the names of their fields."""
    for key in sorted(getattr(config, "sub_configs", {})):
        inner = getattr(config, key, None)
        if inner is not None:
            yield key, inner
