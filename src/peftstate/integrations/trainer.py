"""transformers' `Trainer`, and the trainers of TRL, which build on it."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import peft
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftstate._files import read_manifest
from peftstate._models import PeftModel, attach
from peftstate._storage import ADAPTER_CONFIG_NAME, MANIFEST_NAME

logger = logging.getLogger("peftstate")


class PeftStateCallback(TrainerCallback):
    """Makes all that a trainer saves carry a manifest: checkpoints, the final model, Hub pushes.

    Pass it to the trainer: ``SFTTrainer(…, callbacks=[PeftStateCallback()])``. It attaches to the
    model as soon as the trainer is built, which is after TRL has wrapped it and before anything
    else does. For the pushes it wraps a method of `Trainer`.
    """

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach to the trainer's model, and have its saves record the trainer's tokenizer."""
        del args, state, control, kwargs
        if isinstance(model, peft.PeftModel):
            attach(model, tokenizer=processing_class)
            push_manifests()
        else:
            logger.warning(
                "PeftStateCallback: the model is a %s, not a PEFT model; "
                "its saves carry no manifest.",
                type(model).__name__,
            )


def with_tokenizer(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Trainer.__init__` so that what the trainer saves records its tokenizer."""

    @functools.wraps(original)
    def __init__(self: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if isinstance(self.model, PeftModel):
            attach(self.model, tokenizer=self.processing_class)

    return __init__


def push_manifests() -> None:
    """Have every `Trainer` of this process push the state with the adapters."""
    if not hasattr(Trainer._push_from_checkpoint, _COPIES_STATE):
        original = Trainer._push_from_checkpoint
        Trainer._push_from_checkpoint = with_state(original)  # type: ignore[method-assign]


def with_state(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the push of a checkpoint so that it carries what the checkpoint's manifests name.

    `Trainer` copies a fixed list of files from the checkpoint into the folder that it uploads
    (`transformers/trainer.py::Trainer._push_from_checkpoint`).
    """

    @functools.wraps(original)
    def _push_from_checkpoint(self: Trainer, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            _copy_state(Path(checkpoint_folder), Path(str(self.args.output_dir)))
        original(self, checkpoint_folder)

    setattr(_push_from_checkpoint, _COPIES_STATE, True)
    return _push_from_checkpoint


_COPIES_STATE = "_peftstate_copies_state"


def _copy_state(checkpoint: Path, directory: Path) -> None:
    """Copy a checkpoint's adapter with its state, and those in its sub-folders; the manifest last.

    The sub-folder of an extra adapter has a manifest of its own.
    """
    if not (checkpoint / MANIFEST_NAME).is_file():
        return
    names = {PurePosixPath(name) for name in read_manifest(checkpoint).files}
    for folder in sorted({str(name.parent) for name in names} - {"."}):
        _copy_state(checkpoint / folder, directory / folder)
    directory.mkdir(parents=True, exist_ok=True)
    own = sorted(name.name for name in names if str(name.parent) == ".")
    for name in (*own, ADAPTER_CONFIG_NAME, MANIFEST_NAME):
        shutil.copyfile(checkpoint / name, directory / name)
