"""The kinds of state.

The order is that in which they are compared, restored and reported: the quantization before the
digests of the weights that it gave, the random generators after all that could draw from them, and
the predictions, which draw none, after everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peftstate.sections import (
    adapters,
    base_model,
    dtype,
    environment,
    extra_tensors,
    generation,
    implementation,
    predictions,
    quantization,
    rng,
    runtime,
    tokenizer,
    training,
)
from peftstate.sections._base import Section

SECTIONS: tuple[Section[Any], ...] = (
    quantization.SECTION,
    base_model.SECTION,
    dtype.SECTION,
    adapters.SECTION,
    extra_tensors.SECTION,
    training.SECTION,
    implementation.SECTION,
    generation.SECTION,
    tokenizer.SECTION,
    runtime.SECTION,
    environment.SECTION,
    rng.SECTION,
    predictions.SECTION,
)


def records_for_adapters(records: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The records of some adapters; one that is of more than these is left out."""
    per_adapter = {section.name for section in SECTIONS if section.per_adapter}
    narrowed = {
        name: record.for_adapters(names) if name in per_adapter else record
        for name, record in records.items()
    }
    return {name: record for name, record in narrowed.items() if record is not None}
