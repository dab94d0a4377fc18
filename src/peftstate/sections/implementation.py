"""`implementation`: which code computes attention and experts.

transformers chooses it when it loads a model and writes it into no file; eager and sdpa attention
differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from peftstate.errors import ImplementationMismatchError
from peftstate.sections._base import Section

if TYPE_CHECKING:
    from peftstate.sections._view import ModelView

ATTENTION = frozenset(
    {
        "eager",
        "sdpa",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
    }
)
"""What a manifest may set. Names of kernel repositories are not among them: loading one runs code
from the Hub (CVE-2026-4372)."""
EXPERTS = frozenset({"eager", "batched_mm", "grouped_mm"})
"""What a manifest may set for the experts of a mixture."""


@attrs.frozen(kw_only=True)
class ImplementationRecord:
    """Which code runs.

    Attributes:
        attention: Of the model's config and of each sub-config: ``""``, ``"text_config"`` →
            ``"sdpa"``.
        experts: The same for mixtures of experts.
    """

    attention: Mapping[str, str]
    experts: Mapping[str, str]


def _configs(config: Any) -> Iterator[tuple[str, Any]]:
    """A model's config, and its sub-configs by the name of their attribute."""
    yield "", config
    for name in sorted(getattr(config, "sub_configs", {})):
        inner = getattr(config, name, None)
        if inner is not None:
            yield name, inner


def capture(view: ModelView) -> ImplementationRecord:
    """Read the implementations that are set."""
    config = getattr(view.base, "config", None)
    configs = list(_configs(config)) if config is not None else []

    def values(attribute: str) -> dict[str, str]:
        found = {name: getattr(inner, attribute, None) for name, inner in configs}
        return {name: value for name, value in found.items() if isinstance(value, str)}

    return ImplementationRecord(
        attention=values("_attn_implementation"), experts=values("_experts_implementation")
    )


def restore(record: ImplementationRecord, view: ModelView) -> None:
    """Set the implementations, as far as they are of the closed tables."""
    found = capture(view)
    for saved, live, allowed, setter in (
        (record.attention, found.attention, ATTENTION, "set_attn_implementation"),
        (record.experts, found.experts, EXPERTS, "set_experts_implementation"),
    ):
        wanted = {
            name: value
            for name, value in saved.items()
            if value in allowed and live.get(name, value) != value
        }
        if wanted and hasattr(view.base, setter):
            getattr(view.base, setter)(wanted)


SECTION = Section(
    name="implementation",
    record=ImplementationRecord,
    capture=capture,
    restore=restore,
    error=ImplementationMismatchError,
)
