"""Further adapters on one live base model, as a server loads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from benchmarks._generations import silently
from benchmarks.fidelity._libraries import PEFT, PEFTSTATE
from benchmarks.performance._measure import Comparison, Sample, alternately, timed
from benchmarks.performance._workloads import Workload, check_loaded, save_adapter

COUNTS = (1, 100, 1000)
"""How many adapters there are when a further one is loaded."""
_NAME = "further"


def load_adapter(
    workload: Workload, folder: Path, repetitions: int, counts: Sequence[int] = COUNTS
) -> Iterator[tuple[int, Comparison]]:
    """`load_adapter` of one more adapter, where there are some already.

    Args:
        workload: The base model and the adapter.
        folder: Where the adapter is saved.
        repetitions: How many runs of each library count.
        counts: The numbers of adapters, ascending.

    Yields:
        The number of adapters that were there, and the runs.
    """
    with silently():
        save_adapter(workload.make(), workload.config, folder)
        models = {
            library.name: library.load(workload.make(), folder, is_trainable=False)
            for library in (PEFT, PEFTSTATE)
        }
    for count in counts:
        for model in models.values():
            fill(model, count)
        runs = {name: partial(_load_once, model, folder) for name, model in models.items()}
        found = alternately(runs, repetitions)
        yield count, Comparison(found[PEFT.name], found[PEFTSTATE.name])


def _load_once(model: Any, folder: Path) -> Sample:
    """Load an adapter, and take it out again."""
    with silently():
        _, sample = timed(partial(model.load_adapter, str(folder), _NAME))
    check_loaded(model, folder, _NAME)
    model.delete_adapter(_NAME)
    return sample


def fill(model: Any, count: int) -> None:
    """Copy a model's adapter in it, until there are as many, whose weights share one memory.

    Loading a thousand would take minutes, for PEFT goes over all modules for each of them.
    """
    names = [f"copy-{number}" for number in range(len(model.peft_config), count)]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for name in names:
        model.peft_config[name] = copy.deepcopy(model.peft_config["default"])
        for layer in layers:
            for held in (*layer.adapter_layer_names, *layer.other_param_names):
                values = getattr(layer, held)
                if "default" in values:
                    values[name] = _copy(values["default"])


def _copy(held: Any) -> Any:
    """A copy of what a layer holds for an adapter: of a module, with parameters of its own."""
    copied = copy.deepcopy(held)
    if isinstance(held, nn.Module):
        for parameter, original in zip(copied.parameters(), held.parameters(), strict=True):
            parameter.data = original.data
    return copied
