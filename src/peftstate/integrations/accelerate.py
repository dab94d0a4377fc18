"""accelerate: `save_state` and `load_state` keep the whole state of the PEFT models in them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
from accelerate.utils import DistributedType

from peftstate._api import restore
from peftstate._folder import AdapterFolder
from peftstate._models import PeftModel, attach
from peftstate._policy import OnMismatch, Policy
from peftstate._storage import MANIFEST_NAME
from peftstate._warn import warn
from peftstate.errors import MissingManifestWarning, UnverifiedWarning

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

ADAPTER_FOLDER = "adapter"
"""The folder of the first PEFT model in a saved state; the next ones are ``adapter_1``, and so on,
as accelerate numbers its own files."""

_SHARDED = frozenset(
    {
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
        DistributedType.MEGATRON_LM,
        DistributedType.XLA,
    }
)
"""Where accelerate itself saves the models before it calls a hook."""
_REGISTERED = "_peftstate_registered"


def register(accelerator: Accelerator, *, on_mismatch: OnMismatch | None = None) -> None:
    """Have `save_state` and `load_state` keep the whole state of an accelerator's PEFT models.

    Call it after `accelerator.prepare`: the models are attached then. In place of all weights of a
    PEFT model, those of its base among them, `save_state` writes its adapter folder, with the
    manifest, into ``adapter`` in the state's folder; the other processes write the states of their
    random generators there. `load_state` verifies and restores it into the model that was prepared.
    Other models, optimizers, schedulers and loaders are accelerate's as ever.

    Args:
        accelerator: The accelerator. To register it again does nothing.
        on_mismatch: As in `PeftModel.from_pretrained`.

    Raises:
        ValueError: `on_mismatch` names an action or a section that there is not.
    """
    Policy.of(on_mismatch)
    if hasattr(accelerator, _REGISTERED):
        return
    setattr(accelerator, _REGISTERED, True)
    for model in accelerator._models:
        _attached(accelerator, model)
    accelerator.register_save_state_pre_hook(partial(_save, accelerator))
    accelerator.register_load_state_pre_hook(partial(_load, accelerator, on_mismatch))


def _save(
    accelerator: Accelerator,
    models: list[torch.nn.Module],
    weights: list[dict[str, torch.Tensor]],
    output_dir: str,
) -> None:
    """Save the adapters of the PEFT models, and have accelerate save the rest."""
    if accelerator.distributed_type in _SHARDED:
        _warn_of_sharded(accelerator, models)
        return
    is_aligned = len(weights) == len(models)  # else another hook has taken some of them
    if accelerator.project_configuration.save_on_each_node:
        is_main = accelerator.is_local_main_process
    else:
        is_main = accelerator.is_main_process
    saved = []
    for place, model, folder in _peft_models(accelerator, models):
        model.save_pretrained(Path(output_dir, folder), is_main_process=is_main)
        saved.append(place)
    for place in reversed(saved if is_aligned else []):
        del weights[place]


def _load(
    accelerator: Accelerator,
    on_mismatch: OnMismatch | None,
    models: list[torch.nn.Module],
    input_dir: str,
) -> None:
    """Restore the PEFT models, and have accelerate load the rest."""
    restored = []
    for place, model, folder in _peft_models(accelerator, models):
        path = Path(input_dir, folder)
        if AdapterFolder.at(path).exists(MANIFEST_NAME):
            restore(model, path, on_mismatch=on_mismatch)
            restored.append(place)
        else:
            warn(
                f"{path}: there is no peftstate manifest, so accelerate loads this model by "
                "itself; nothing of its state is verified.",
                MissingManifestWarning,
            )
    for place in reversed(restored):
        del models[place]


def _peft_models(
    accelerator: Accelerator, models: list[torch.nn.Module]
) -> Iterator[tuple[int, PeftModel, str]]:
    """The PEFT models: their places in a list, themselves, attached, and their folders."""
    number = 0
    for place, model in enumerate(models):
        attached = _attached(accelerator, model)
        if attached is not None:
            yield place, attached, f"{ADAPTER_FOLDER}_{number}" if number else ADAPTER_FOLDER
            number += 1


def _attached(accelerator: Accelerator, model: Any) -> PeftModel | None:
    """The PEFT model in what `prepare` made of it, attached; `None` if there is none."""
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    return attach(inner) if isinstance(inner, peft.PeftModel) else None


def _warn_of_sharded(accelerator: Accelerator, models: list[torch.nn.Module]) -> None:
    """Say that a state is saved without ours, if there is a PEFT model in it."""
    if any(True for _ in _peft_models(accelerator, models)):
        warn(
            f"With {accelerator.distributed_type} accelerate saves the models by itself, in "
            "pieces; the state of the PEFT models in them is not saved beside them.",
            UnverifiedWarning,
        )
