"""All faults."""

from __future__ import annotations

from benchmarks._faults import of_config, of_folder, of_state, of_weights, of_world
from benchmarks._faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *of_weights.FAULTS,
    *of_config.FAULTS,
    *of_state.FAULTS,
    *of_folder.FAULTS,
    *of_world.FAULTS,
)
