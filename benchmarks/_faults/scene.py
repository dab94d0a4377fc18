"""The saved models that faults are injected into, and what a load of one comes to."""

from __future__ import annotations

import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import peft
import torch
import transformers
from torch import nn

import peftstate
from benchmarks._faults.edits import written_to
from peftstate.errors import PeftStateError

HANGS = 1.9
"""Seconds that no load of a tiny model takes."""
IDS = torch.arange(4, 28).reshape(2, 12)

QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def write_checkpoint(folder: Path, *, seed: int, **fields: Any) -> Path:
    """Write the checkpoint of a tiny Llama in fp32, with random weights."""
    fields = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.save_pretrained(folder)
    return folder


def load_base(folder: Path, *, quantized: str | None = None, **options: Any) -> Any:
    """Load a base model, in fp32 unless something else is said."""
    if quantized is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**QUANTIZED[quantized])
    options = {"dtype": torch.float32, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    """What a model predicts."""
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=IDS).logits.float()
    return output


def seed_all(seed: int) -> None:
    """Seed every generator of the process, each in its own way."""
    random.seed(100 * seed)
    np.random.seed(100 * seed + 1)
    torch.manual_seed(100 * seed + 2)


def generators() -> tuple[Any, ...]:
    """The states of every generator of the process."""
    numpy: Any = np.random.get_state(legacy=True)
    words = numpy[1].tolist()
    return random.getstate(), words, numpy[2:], torch.get_rng_state().tolist()


def draws() -> list[float]:
    """Random numbers of every generator of the process, normal ones among them."""
    drawn = [random.random() for _ in range(700)] + [random.gauss(0, 1) for _ in range(3)]
    drawn += [*np.random.rand(700).tolist(), *np.random.randn(3).tolist()]
    drawn += [*torch.rand(700).tolist(), *torch.randn(33).tolist()]
    return drawn


@attrs.frozen(kw_only=True)
class Saved:
    """What all faults start from.

    Attributes:
        checkpoint: The base model.
        other_checkpoint: Another base model of the same shapes.
        folder: The saved adapter.
        other: A save of another adapter of the same shapes, on the same base model.
        later: A save of the same adapter, after some random numbers more were drawn.
        logits: What the saved model predicts.
        draws: The random numbers that follow the save.
    """

    checkpoint: Path
    other_checkpoint: Path
    folder: Path
    other: Path
    later: Path
    logits: torch.Tensor
    draws: list[float]

    @classmethod
    def make(cls, root: Path) -> Saved:
        """Train nothing, but save as if: a tiny Llama with LoRA of rank 4 on q and v.

        Args:
            root: An empty folder.
        """
        checkpoint = write_checkpoint(root / "base", seed=0)
        other_checkpoint = write_checkpoint(root / "other-base", seed=1)
        _save(checkpoint, root / "other", seed=3)
        model = _save(checkpoint, root / "adapter", seed=2)
        drawn = draws()
        model.save_pretrained(root / "later", prediction_probe=IDS)
        return cls(
            checkpoint=checkpoint,
            other_checkpoint=other_checkpoint,
            folder=root / "adapter",
            other=root / "other",
            later=root / "later",
            logits=logits(model),
            draws=drawn,
        )


def lora_config(**fields: Any) -> peft.LoraConfig:
    """The config of the adapter that is saved."""
    fields = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": False,  # random B, or the adapter does nothing
        "task_type": "CAUSAL_LM",
        **fields,
    }
    return peft.LoraConfig(**fields)


def _save(checkpoint: Path, folder: Path, *, seed: int) -> Any:
    """Save an adapter, and one more in a sub-folder; gives the model."""
    base = load_base(checkpoint)
    seed_all(seed)
    model = peftstate.get_peft_model(base, lora_config())
    model.add_adapter("extra", lora_config(r=2))
    model.eval()
    model.save_pretrained(folder, prediction_probe=IDS)
    return model


@attrs.define(kw_only=True)
class Case:
    """One load, which a fault may change.

    Attributes:
        saved: What all faults start from.
        folder: A copy of the saved adapter, free to be damaged.
        base: Makes the base model that it is loaded onto.
        loading: What the load runs in.
    """

    saved: Saved
    folder: Path
    base: Callable[[], nn.Module]
    loading: Callable[[], AbstractContextManager[Any]] = nullcontext

    @classmethod
    def of(cls, saved: Saved, folder: Path) -> Case:
        """A case in which nothing is wrong yet.

        Args:
            saved: What is copied.
            folder: Where to; it must not exist.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(saved.folder, folder)
        return cls(saved=saved, folder=folder, base=lambda: load_base(saved.checkpoint))


def block(case: Case, name: str) -> None:
    """Put a named pipe where a file was."""
    pipe = case.folder / name
    pipe.unlink()
    os.mkfifo(pipe)
    case.loading = lambda: written_to(pipe)


def save_as_pickle(case: Case) -> None:
    """Save the same model again, with its weights as PEFT's older format, a pickle."""
    model = ours(case.base(), case.saved.folder)
    shutil.rmtree(case.folder)
    model.save_pretrained(case.folder, safe_serialization=False)


@attrs.frozen(kw_only=True)
class Outcome:
    """What a load came to.

    Attributes:
        error: What was raised, if anything was.
        warned: The warnings, as they read.
        delta: How far the logits are from the saved model's; `None` if nothing was loaded.
        same_draws: Whether the random numbers go on as after the save.
        left_alone: Whether a load that failed left the generators as they were.
        hung: Whether it only came to an end since somebody saw to that.
    """

    error: BaseException | None = None
    warned: tuple[str, ...] = ()
    delta: float | None = None
    same_draws: bool = False
    left_alone: bool = False
    hung: bool = False

    @property
    def is_wrong(self) -> bool:
        """Whether a model came back that predicts something else."""
        return self.delta is not None and self.delta != 0

    @property
    def is_silent(self) -> bool:
        """Whether nobody was told of anything."""
        return self.error is None and not self.warned

    @property
    def is_typed(self) -> bool:
        """Whether the error is one of ours."""
        return isinstance(self.error, PeftStateError)


Loader = Callable[[nn.Module, Path], Any]


def plain_peft(base: nn.Module, folder: Path) -> Any:
    """A load with PEFT alone."""
    return peft.PeftModel.from_pretrained(base, folder)


def ours(base: nn.Module, folder: Path) -> Any:
    """A load with peftstate."""
    return peftstate.PeftModel.from_pretrained(base, folder)


def outcome(case: Case, loader: Loader) -> Outcome:
    """Load a case, and see what comes of it."""
    base = case.base()
    seed_all(0)
    before = generators()
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught, case.loading():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, of one another
        try:
            model = loader(base, case.folder)
        except Exception as error:  # noqa: BLE001 - which errors come is what is measured
            hung = time.monotonic() - start > HANGS
            return Outcome(error=error, left_alone=generators() == before, hung=hung)
    drawn = draws()
    warned = tuple(f"{warning.category.__name__}: {warning.message}" for warning in caught)
    return Outcome(
        warned=warned,
        delta=_distance(logits(model), case.saved.logits),
        same_draws=drawn == case.saved.draws,
        hung=time.monotonic() - start > HANGS,
    )


def _distance(found: torch.Tensor, saved: torch.Tensor) -> float:
    """The largest difference of two predictions; NaN where one of them is."""
    if found.shape != saved.shape:
        return float("inf")
    return float((found - saved).abs().max())
