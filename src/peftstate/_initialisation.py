"""Initialisations that rewrite the base model, such as PiSSA: they are not begun anew by a load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from peftstate.errors import RestoreError
from peftstate.sections import _origin, extra_tensors

if TYPE_CHECKING:
    from peftstate._diff import Json
    from peftstate._source import AdapterFiles, Source
    from peftstate._steps import Plan
    from peftstate.sections._view import ModelView


def without_initialisation(source: Source, plan: Plan, view: ModelView) -> Source:
    """What was read, for PEFT to load without beginning the adapters as they began.

    To rewrite the base model's weights once more takes data (CorDA), a GPU (LoftQ) or the same
    random numbers (PiSSA with `svd_lowrank`), and is of no use: the sidecar has these weights.
    `put_back_initialisation` is to follow.

    Args:
        source: What was read.
        plan: Which sections are restored.
        view: The bare base model.
    """
    if extra_tensors.SECTION not in plan.sections(view, source.manifest):
        return source
    if not source.manifest.sections["extra_tensors"].has_base:
        return source
    adapters = {name: _plainly(files) for name, files in source.adapters.items()}
    return attrs.evolve(source, adapters=adapters)


_PLAINLY: dict[str, Json] = {
    "init_lora_weights": True,
    "corda_config": None,
    "loftq_config": {},
    "lora_ga_config": None,
}
"""What an adapter's config says instead."""


def _plainly(files: AdapterFiles) -> AdapterFiles:
    """An adapter as it was read, with PEFT's default initialisation in place of a rewriting one."""
    if not _origin.is_rewriting(files.config.get("init_lora_weights")):
        return files
    changed = {key: value for key, value in _PLAINLY.items() if key in files.config}
    return attrs.evolve(files, config={**files.config, **changed})


def check_loads_alone(source: Source) -> None:
    """Refuse an adapter that needs a base model with other weights, where these are not restored.

    PiSSA and OLoRA come out the same, if all goes well, and the comparison sees to it.

    Raises:
        RestoreError: Its initialisation takes data, random numbers or a device of its own.
    """
    init = source.adapters[source.own_adapter].config.get("init_lora_weights")
    repeats = not _origin.is_rewriting(init) or str(init).lower() in {"pissa", "olora"}
    if source.manifest.sections["extra_tensors"].has_base and not repeats:
        raise RestoreError(
            "extra_tensors",
            f"the adapter began with rewriting weights of the base model ({init!r}), which "
            "load_adapter cannot repeat; load it with PeftModel.from_pretrained onto a base model "
            "of its own, or save it with path_initial_model_for_weight_conversion=",
        )


@contextmanager
def not_truncated_again(source: Source, view: ModelView) -> Iterator[None]:
    """Keep the base model's weights while PEFT loads a KaSA adapter into a live model.

    PEFT truncates them with each such adapter, under those that are there
    (`peft/tuners/lora/variants.py::KasaLinearVariant.init`). Those that one of the same rank has
    truncated already are what the adapter needs; of others the comparison tells.
    """
    truncates = source.adapters[source.own_adapter].config.get("kasa_config") is not None
    tensors = [site.tensor for site in view.tensors() if truncates and site.part == "base"]
    before = [(tensor, tensor.data) for tensor in tensors]
    yield
    for tensor, data in before:
        tensor.data = data


def put_back_initialisation(view: ModelView, files: Mapping[str, AdapterFiles]) -> None:
    """Have the configs in the model say again how the adapters began."""
    for saved, read in files.items():
        config = view.model.peft_config[view.adapters[saved]]
        if _plainly(read) is not read:
            for key in _PLAINLY.keys() & read.config.keys():
                setattr(config, key, read.config[key])
