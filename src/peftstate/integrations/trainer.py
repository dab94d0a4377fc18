"""transformers' `Trainer`, and the trainers of TRL, which build on it."""

from __future__ import annotations

import logging
from typing import Any

import peft
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftstate._models import attach

logger = logging.getLogger("peftstate")


class PeftStateCallback(TrainerCallback):
    """Makes all that a trainer saves carry a manifest: checkpoints and the final model.

    Pass it to the trainer: ``SFTTrainer(…, callbacks=[PeftStateCallback()])``. It attaches to the
    model as soon as the trainer is built, which is after TRL has wrapped it and before anything
    else does.
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
        else:
            logger.warning(
                "PeftStateCallback: the model is a %s, not a PEFT model; "
                "its saves carry no manifest.",
                type(model).__name__,
            )
