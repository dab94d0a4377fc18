"""Base models, adapters, a few steps of training, and what a model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import peft
import torch
import transformers

import peftstate
from benchmarks.fidelity._checkpoints import CHECKPOINTS

IDS = torch.arange(4, 16).reshape(2, 6)
SEED = 0
"""The seed of every training."""
NF4 = "nf4"
QLORA = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
V4 = transformers.__version__ < "5"
"""Whether this is transformers 4, which some outcomes depend on."""
INT8 = {"load_in_8bit": True}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@attrs.frozen
class Place:
    """Where the checkpoints of the base models are; each is made when it is first asked for.

    Attributes:
        root: A folder.
    """

    root: Path

    def checkpoint(self, name: str = "llama") -> Path:
        """The folder of a checkpoint, in bf16: the same values in whatever dtype it is loaded."""
        folder = self.root / name.replace(" ", "-")
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                CHECKPOINTS[name]().bfloat16().save_pretrained(folder)
        return folder

    def load(
        self,
        kind: str = "fp32",
        checkpoint: str | Path = "llama",
        auto_class: str = "AutoModelForCausalLM",
        **options: Any,
    ) -> Any:
        """Load a fresh base model.

        Args:
            kind: A dtype, ``"nf4"`` as in QLoRA, or ``"int8"``.
            checkpoint: The name of a checkpoint, or its folder.
            auto_class: The class of transformers that loads it.
            **options: Of `from_pretrained`.
        """
        if kind in _DTYPES:
            options = {"dtype": _DTYPES[kind], **options}
        else:
            config = quantization(INT8 if kind == "int8" else QLORA)
            options = {"dtype": torch.bfloat16, "quantization_config": config, **options}
        folder = self.checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        return getattr(transformers, auto_class).from_pretrained(folder, **options)


Make = Callable[[Place], Any]
"""Makes or loads a model."""


def quantization(fields: dict[str, Any], **changes: Any) -> transformers.BitsAndBytesConfig:
    """A quantization config."""
    return transformers.BitsAndBytesConfig(**{**fields, **changes})


def base(kind: str = "fp32", checkpoint: str = "llama", **options: Any) -> Make:
    """Loads a base model so."""
    return lambda place: place.load(kind, checkpoint, **options)


def lora(**fields: Any) -> peft.LoraConfig:
    """A LoRA config, as most people write it."""
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**{**defaults, **fields})


def adapted(model: Any, config: peft.PeftConfig | None = None) -> Any:
    """A base model with an adapter, attached before it is trained."""
    return peftstate.get_peft_model(model, config or lora())


def train(model: Any, **inputs: torch.Tensor) -> Any:
    """Train what is trainable for two steps; the model stays in train mode, as it does.

    Args:
        model: The model.
        **inputs: What it is trained on, with labels; by default, text.
    """
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    for _ in range(2):
        model(**(inputs or {"input_ids": IDS, "labels": IDS})).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(model: Any, config: peft.PeftConfig | None = None) -> Any:
    """A base model with an adapter that was trained."""
    return train(adapted(model, config))


def trained_lora(make_base: Make = Place.load, **fields: Any) -> Make:
    """Makes a model with a LoRA adapter, and trains it.

    Args:
        make_base: Loads the base model.
        **fields: Of the config.
    """
    return lambda place: trained(make_base(place), lora(**fields))


def logits(model: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a model in eval mode."""
    return outputs(model, "logits", **inputs)


def outputs(model: Any, *names: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a model in eval mode, for several of its outputs."""
    with torch.no_grad():
        found = model.eval()(**(inputs or {"input_ids": IDS}))
    return {name: found[name] for name in names}
