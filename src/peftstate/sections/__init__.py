"""The kinds of state.

The order is that in which they are compared, restored and reported: the quantization before the
digests of the weights that it gave, the random generators after all that could draw from them.
"""

from __future__ import annotations

from typing import Any

from peftstate.sections import (
    adapters,
    base_model,
    dtype,
    environment,
    extra_tensors,
    generation,
    implementation,
    quantization,
    rng,
    training,
)
from peftstate.sections._base import Section

SECTIONS: tuple[Section[Any], ...] = (
    quantization.SECTION,
    base_model.SECTION,
    dtype.SECTION,
    adapters.SECTION,
    extra_tensors.SECTION,
    implementation.SECTION,
    training.SECTION,
    generation.SECTION,
    environment.SECTION,
    rng.SECTION,
)
