"""What a model is, what it answers, and whether a reloaded model is and answers the same.

The state of a model has to be read before the model runs, since a forward pass changes it: in eval
mode, on a CPU with AVX512-BF16, bitsandbytes repacks the 4-bit weights
(`bitsandbytes/nn/modules.py::Linear4bit.forward`). So `State.of` comes first, for the model in
memory as for every reloaded one, and `Answer.of` after it.
"""

from __future__ import annotations

import copy
import random
from typing import Any, Self, TypeAlias

import attrs
import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit
from transformers import GenerationConfig, PreTrainedTokenizerBase

PeftModel: TypeAlias = Any
"""PEFT's or peftstate's. To a type checker what either forwards to its base model is a tensor."""


@attrs.frozen(kw_only=True, eq=False)
class RandomState:
    """The random generators of the process: where their next numbers come from."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: list[torch.Tensor]

    @classmethod
    def now(cls) -> Self:
        """Read the generators; no number is drawn."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),
            torch=[torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        )

    def set(self) -> None:
        """Put the generators of the process into this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch[0])
        torch.cuda.set_rng_state_all(self.torch[1:])

    def next_numbers(self, count: int = 16) -> tuple[list[float], ...]:
        """What python, numpy, torch and every GPU would draw next; nothing is drawn in fact."""
        before = RandomState.now()
        self.set()
        devices = ["cpu", *(f"cuda:{index}" for index in range(len(self.torch) - 1))]
        drawn = (
            [random.random() for _ in range(count)],
            np.random.rand(count).tolist(),
            *(torch.rand(count, device=device).tolist() for device in devices),
        )
        before.set()
        return drawn


@attrs.frozen(kw_only=True)
class State:
    """What decides, beside the weights, what a model computes and generates next."""

    quantization: dict[str, tuple[Any, ...]]
    """Quant type, block size and double quantization of every 4-bit layer."""

    compute_dtype: dict[str, torch.dtype | None]
    adapter_dtype: dict[str, torch.dtype]
    train_flags: dict[str, bool]
    generation_config: GenerationConfig
    random_numbers: tuple[list[float], ...]

    @classmethod
    def of(cls, model: PeftModel) -> Self:
        """Read the state of a live PEFT model that has not run since it was loaded or trained."""
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        return cls(
            quantization={name: _quantization(layer.weight) for name, layer in layers.items()},
            compute_dtype={name: layer.compute_dtype for name, layer in layers.items()},
            adapter_dtype={n: p.dtype for n, p in model.named_parameters() if "lora_" in n},
            train_flags={name: module.training for name, module in model.named_modules()},
            generation_config=copy.deepcopy(model.generation_config),
            random_numbers=RandomState.now().next_numbers(),
        )


@attrs.frozen(kw_only=True, eq=False)
class Answer:
    """What a model makes of a prompt."""

    logits: torch.Tensor
    text: str

    @classmethod
    def of(
        cls,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        random_state: RandomState,
    ) -> Self:
        """Let the model answer, in eval mode.

        Args:
            model: The model; it is left in eval mode.
            tokenizer: The tokenizer of the model.
            prompt: The text to go on from.
            random_state: What to sample from. Every model is given the same, also those whose
                reload lost theirs, so that another text means another model.
        """
        model.eval()
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.no_grad():
            logits = model(**inputs).logits.float().cpu()
            random_state.set()
            # No argument here: how to sample is up to the generation config of the model.
            tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        return cls(logits=logits, text=str(tokenizer.decode(tokens, skip_special_tokens=True)))


@attrs.frozen(kw_only=True)
class Comparison:
    """A reloaded model against the model that was saved."""

    title: str
    logit_difference: float
    same_text: bool
    kept: dict[str, bool]
    """For each field of `State`, whether it came back."""

    @classmethod
    def of(cls, title: str, saved: tuple[State, Answer], found: tuple[State, Answer]) -> Self:
        """Compare what was read before the save with what was read after the reload."""
        difference = (saved[1].logits - found[1].logits).abs().max().item()
        return cls(
            title=title,
            logit_difference=difference,
            same_text=saved[1].text == found[1].text,
            kept={
                field.name: getattr(saved[0], field.name) == getattr(found[0], field.name)
                for field in attrs.fields(State)
            },
        )

    @property
    def exact(self) -> bool:
        """Whether nothing at all differs."""
        return self.logit_difference == 0.0 and self.same_text and all(self.kept.values())


def _quantization(weight: Any) -> tuple[Any, ...]:
    """How a 4-bit weight is quantized, by what it holds and not by what was asked for."""
    state = weight.quant_state
    return state.quant_type, state.blocksize, state.nested
