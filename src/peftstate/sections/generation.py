"""`generation`: the generation config and `use_cache`.

PEFT saves neither, so edits made in the session (by the user, by TRL's `eos_token=`, by the
Trainer's alignment of special tokens) are lost: the reloaded model samples at another temperature
or does not stop.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._diff import Json
from peftstate.errors import GenerationConfigMismatchError
from peftstate.sections._base import Section

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from peftstate.sections._view import ModelView

NOT_SAVED = frozenset(
    {
        "transformers_version",  # is in `environment`
        "_commit_hash",  # is in `base_model`
        "compile_config",  # an object; compiling is up to the caller
        "continuous_batching_config",  # an object, of a server's scheduler
    }
)
"""Fields of `GenerationConfig` that are no part of the record."""


@attrs.frozen(kw_only=True)
class GenerationRecord:
    """How a model generates.

    Attributes:
        config: The fields of ``model.generation_config``; `None` if the model has none.
        use_cache: ``model.config.use_cache``; `None` if the config has no such field.
    """

    config: Mapping[str, Json] | None
    use_cache: bool | None


def _config_of(view: ModelView) -> GenerationConfig | None:
    """The generation config that `generate` takes."""
    config: GenerationConfig | None = getattr(view.base, "generation_config", None)
    return config


def capture(view: ModelView) -> GenerationRecord:
    """Read the generation config."""
    config = _config_of(view)
    use_cache = getattr(getattr(view.base, "config", None), "use_cache", None)
    return GenerationRecord(
        config=None if config is None else fields(config),
        use_cache=use_cache if isinstance(use_cache, bool) else None,
    )


def fields(config: GenerationConfig) -> dict[str, Json]:
    """The fields of a generation config as JSON; those that are unset, as by default, left out."""
    from transformers import GenerationConfig

    unset = {key for key, value in GenerationConfig().to_dict().items() if value is None}
    values = {
        key: value
        for key, value in config.to_dict().items()
        if key not in NOT_SAVED and not (value is None and key in unset)
    }
    decoded: dict[str, Json] = json.loads(json.dumps(values, sort_keys=True, default=_jsonable))
    return decoded


def _jsonable(value: Any) -> Json:
    """What `json` does not know of a generation config: the objects of `watermarking_config`."""
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


_TEXTS = {
    "cache_implementation": (
        *("static", "offloaded_static", "dynamic", "dynamic_full", "offloaded", "quantized"),
        *("paged", "sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid"),
        *("offloaded_hybrid_chunked", "mamba"),
    ),
    "dola_layers": ("low", "high"),
    "early_stopping": ("never",),
    "num_assistant_tokens_schedule": ("constant", "heuristic", "heuristic_transient"),
    "speculation_type": ("dflash",),
}
"""The fields that may be a text, and what a manifest may put there: names of classes of
transformers' own."""
_ORIGINAL = "_original_object_hash"
"""By which transformers sees that a config, taken from the model's, was edited since
(`transformers/generation/utils.py::GenerationMixin._prepare_generation_config`)."""


def restore(record: GenerationRecord, view: ModelView) -> None:
    """Give the base model a generation config with the saved fields."""
    from transformers import PretrainedConfig

    live = _config_of(view)
    if record.config is not None and live is not None and record.config != fields(live):
        view.base.generation_config = _config(record.config, live)
    config: Any = getattr(view.base, "config", None)
    if record.use_cache is not None and isinstance(config, PretrainedConfig):
        config.use_cache = record.use_cache  # `Trainer` sets it on vision models, too


def _config(saved: Mapping[str, Json], live: GenerationConfig) -> GenerationConfig:
    """A generation config with the saved fields.

    Those that neither this transformers nor the live model knows are left out, as are texts that no
    table has, and show as a difference. They are set one by one, since the constructor refuses
    values that contradict each other, which a live model may well have, and drops what it does not
    know.
    """
    from transformers import GenerationConfig

    config = GenerationConfig()
    known = (config.to_dict().keys() | live.to_dict().keys()) - NOT_SAVED
    for key in sorted(known & saved.keys()):
        value = saved[key]
        if isinstance(value, str) and not _may_be(key, value, live):
            continue
        if key == "watermarking_config" and isinstance(value, Mapping):
            value = _watermarking(value)
        setattr(config, key, copy.deepcopy(value))
    original = getattr(live, _ORIGINAL, None)
    if original is not None:
        setattr(config, _ORIGINAL, original)
    return config


def _may_be(key: str, text: str, live: GenerationConfig) -> bool:
    """Whether a manifest may put a text into a field."""
    return key == "stop_strings" or text in (*_TEXTS.get(key, ()), getattr(live, key, None))


def _watermarking(saved: Mapping[str, Json]) -> Any:
    """The object that `generate` takes, of the class that has the saved fields."""
    from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

    synth = SynthIDTextWatermarkingConfig(ngram_len=1, keys=[])
    if saved.keys() == synth.to_dict().keys():
        return SynthIDTextWatermarkingConfig(**saved)
    known = WatermarkingConfig().to_dict().keys() & saved.keys()
    return WatermarkingConfig(**{key: saved[key] for key in known})


UNKNOWN = GenerationRecord(config=None, use_cache=None)
"""Also what a model has that does not generate; then there is nothing to compare."""

SECTION = Section(
    name="generation",
    record=GenerationRecord,
    capture=capture,
    restore=restore,
    unknown=UNKNOWN,
    error=GenerationConfigMismatchError,
)
