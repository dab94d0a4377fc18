"""Train a QLoRA adapter, save it, reload it in four ways, compare each with what was saved.

Two reloads are plain PEFT, as its tutorials show it; two are peftstate. This is an end-to-end test,
too: the exit code is 0 when both peftstate reloads are the saved model in every row of the table.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

# It warns as it is imported, of an optional kernel.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import attrs
import datasets
import peft
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

import peftstate
from peftstate import PeftStateCallback
from peftstate._demo.measure import Answer, Comparison, PeftModel, RandomState, State
from peftstate._demo.show import quiet, table
from peftstate._demo.tiny import SENTENCES, tiny_checkpoint

SEED = 42
PROMPT = "The harbour was quiet when"


def quantization_config() -> BitsAndBytesConfig:
    """The settings of the QLoRA paper."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_base(checkpoint: str) -> PreTrainedModel:
    """Load the base model afresh, quantized."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantization_config(), dtype=torch.bfloat16
    )
    return base


def train(checkpoint: str, output: Path, steps: int) -> SFTTrainer:
    """Train a LoRA adapter on all linear layers with TRL, for a few steps."""
    trainer = SFTTrainer(
        model=load_base(checkpoint),
        args=SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            max_length=64,
            seed=SEED,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in SENTENCES]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=peft.LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[PeftStateCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def set_generation(model: PeftModel) -> None:
    """Change how the model generates, as people do before they try out what they trained."""
    model.generation_config.update(do_sample=True, temperature=0.8, top_k=40, max_new_tokens=24)


def peft_model(checkpoint: str, adapter: Path) -> PeftModel:
    """Reload with plain PEFT and everything that its tutorials advise."""
    model = peft.PeftModel.from_pretrained(load_base(checkpoint), adapter)
    model.eval()
    set_seed(SEED)
    return model


def peft_auto_model(_checkpoint: str, adapter: Path) -> PeftModel:
    """Reload with plain PEFT in one line."""
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    model.eval()
    set_seed(SEED)
    return model


def peftstate_model(checkpoint: str, adapter: Path) -> PeftModel:
    """Reload with peftstate, on a base model that the caller loads."""
    return peftstate.PeftModel.from_pretrained(load_base(checkpoint), adapter)


def peftstate_auto_model(_checkpoint: str, adapter: Path) -> PeftModel:
    """Reload with peftstate, the base model included."""
    return peftstate.AutoPeftModelForCausalLM.from_pretrained(adapter)


@attrs.frozen(kw_only=True)
class Reload:
    """One way to get a saved adapter back."""

    title: str
    load: Callable[[str, Path], PeftModel]
    is_exact: bool
    """Whether it promises the model that was saved."""


RELOADS = (
    Reload(title="peft\nPeftModel", load=peft_model, is_exact=False),
    Reload(title="peft\nAutoPeftModel", load=peft_auto_model, is_exact=False),
    Reload(title="peftstate\nPeftModel", load=peftstate_model, is_exact=True),
    Reload(title="peftstate\nAutoPeftModel", load=peftstate_auto_model, is_exact=True),
)


@attrs.frozen(kw_only=True)
class Saved:
    """A saved adapter, and what the model in memory was and answered when it was saved."""

    checkpoint: str
    adapter: Path
    tokenizer: PreTrainedTokenizerBase
    random_state: RandomState
    state: State
    answer: Answer


def save(trainer: SFTTrainer, checkpoint: str, adapter: Path) -> Saved:
    """Save what was trained; measure its state before the save and its answer after it."""
    model, tokenizer = trainer.model, cast("PreTrainedTokenizerBase", trainer.processing_class)
    random_state, state = RandomState.now(), State.of(model)
    trainer.save_model(str(adapter))
    return Saved(
        checkpoint=checkpoint,
        adapter=adapter,
        tokenizer=tokenizer,
        random_state=random_state,
        state=state,
        answer=Answer.of(model, tokenizer, PROMPT, random_state),
    )


def reload(how: Reload, saved: Saved) -> Comparison:
    """Reload a saved adapter, the base model included, and compare it with what was saved."""
    # What a new process might start with, and not the state that was saved a moment ago.
    set_seed(0)
    model = how.load(saved.checkpoint, saved.adapter)
    state = State.of(model)
    answer = Answer.of(model, saved.tokenizer, PROMPT, saved.random_state)
    return Comparison.of(how.title, (saved.state, saved.answer), (state, answer))


def run(
    checkpoint: str, output: Path, steps: int, say: Callable[[str], object]
) -> list[Comparison]:
    """Train, save, reload in every way.

    Args:
        checkpoint: The base model, a folder or a Hub id.
        output: Where the adapter is saved.
        steps: Training steps.
        say: Told what is going on.

    Returns:
        One comparison a reload, in the order of `RELOADS`.
    """
    say(f"training a QLoRA adapter for {steps} steps: nf4, double quantization, bf16")
    trainer = train(checkpoint, output, steps)
    set_generation(trainer.model)
    say("saving it")
    saved = save(trainer, checkpoint, output)
    del trainer

    comparisons = []
    for how in RELOADS:
        say(f"reloading it with {' '.join(how.title.split())}")
        comparisons.append(reload(how, saved))
        # Models hold reference cycles; two of them at a time are enough.
        gc.collect()
    return comparisons


def exit_code(comparisons: Sequence[Comparison]) -> int:
    """0 if every reload that promises the saved model gave it back, else 1."""
    pairs = zip(RELOADS, comparisons, strict=True)
    return int(any(reload.is_exact and not c.exact for reload, c in pairs))


def demonstrate(checkpoint: str | None, output: Path | None, steps: int, console: Console) -> int:
    """Run it, and print what was found.

    Args:
        checkpoint: The base model, a folder or a Hub id; `None` for a tiny one with random weights.
        output: Where the adapter is saved; `None` for a temporary folder.
        steps: Training steps.
        console: Where to print.

    Returns:
        The exit code.
    """
    with quiet(), tempfile.TemporaryDirectory(prefix="peftstate-") as work:
        if checkpoint is None:
            console.print("making a tiny Llama")
            checkpoint = tiny_checkpoint(Path(work, "base"))
        comparisons = run(checkpoint, output or Path(work, "adapter"), steps, console.print)
    console.print(table(comparisons))
    return exit_code(comparisons)
