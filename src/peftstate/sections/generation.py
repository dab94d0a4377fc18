"""`generation`: the generation config and `use_cache`.

PEFT saves neither, so edits made in the session (by the user, by TRL's `eos_token=`, by the
Trainer's alignment of special tokens) are lost: the reloaded model samples at another temperature
or does not stop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

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
    decoded: dict[str, Json] = json.loads(json.dumps(values, sort_keys=True, default=str))
    return decoded


def restore(record: GenerationRecord, view: ModelView) -> None:
    """Give the base model a generation config with the saved fields."""
    from transformers import GenerationConfig

    live = _config_of(view)
    if record.config is not None and live is not None:
        # The constructor takes any name as an attribute. A manifest may set those that this
        # transformers, or this model, knows; the rest shows as a difference.
        known = (GenerationConfig().to_dict().keys() | live.to_dict().keys()) - NOT_SAVED
        saved = {key: value for key, value in record.config.items() if key in known}
        view.base.generation_config = GenerationConfig(**saved)
    if record.use_cache is not None and hasattr(view.base.config, "use_cache"):
        view.base.config.use_cache = record.use_cache


SECTION = Section(
    name="generation",
    record=GenerationRecord,
    capture=capture,
    restore=restore,
    error=GenerationConfigMismatchError,
)
