"""Further situations: other tuners than LoRA, and other ways to set LoRA up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from benchmarks.fidelity._models import NF4, Place, base, lora, train, trained, trained_lora
from benchmarks.fidelity._situation import Situation

TARGETS = ["q_proj", "down_proj"]
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def _of(title: str, config: Callable[[], peft.PeftConfig], kind: str = "fp32") -> Situation:
    """A tuner on a base model that is loaded as it was."""
    return Situation(
        title=f"{title}, in {kind}",
        build=lambda place: trained(place.load(kind), config()),
        base=base(kind),
    )


def two_merged(place: Place) -> Any:
    """A model that two adapters are merged into, one after the other."""
    model = trained_lora(base("bf16"))(place)
    model.add_adapter("b", lora(target_modules=["q_proj"]))
    model.set_adapter("b")
    train(model)
    model.base_model.set_adapter(["default", "b"])
    model.merge_adapter(["default", "b"])
    return model


def safely_merged(place: Place) -> Any:
    """A model merged with `safe_merge`, which adds in another way."""
    model = trained_lora(base("bf16"), use_dora=True)(place)
    model.merge_adapter(safe_merge=True)
    return model


SITUATIONS = (
    _of("DoRA", lambda: lora(use_dora=True)),
    _of("DoRA", lambda: lora(use_dora=True), NF4),
    _of("rank-stabilized LoRA", lambda: lora(use_rslora=True)),
    _of("LoRA with `bias='all'`", lambda: lora(bias="all")),
    _of(
        "LoRA on the embeddings and the head",
        lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    ),
    _of("LoRA with ranks of its own per layer", lambda: lora(rank_pattern={"q_proj": 2})),
    _of(
        "AdaLoRA",
        lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=9, target_modules=TARGETS, **CAUSAL
        ),
    ),
    _of(
        "IA³",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
        ),
    ),
    _of("LoHa", lambda: peft.LoHaConfig(r=4, target_modules=TARGETS, **CAUSAL)),
    _of("LoKr", lambda: peft.LoKrConfig(r=4, target_modules=TARGETS, **CAUSAL)),
    _of("OFT", lambda: peft.OFTConfig(oft_block_size=16, target_modules=TARGETS, **CAUSAL)),
    _of("RandLoRA", lambda: peft.RandLoraConfig(r=4, target_modules=TARGETS, **CAUSAL)),
    _of(
        "FourierFT", lambda: peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS, **CAUSAL)
    ),
    _of("LayerNorm tuning", lambda: peft.LNTuningConfig(target_modules=["norm"], **CAUSAL)),
    _of("prompt tuning", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL)),
    _of("prefix tuning", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL)),
    _of("prompt tuning", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL), "bf16"),
    _of("LoRA with `trainable_token_indices`", lambda: lora(trainable_token_indices=[4, 5, 6])),
    Situation(
        title="two adapters merged, in bf16",
        build=two_merged,
        base=base("bf16"),
    ),
    Situation(
        title="DoRA merged with `safe_merge`, in bf16",
        build=safely_merged,
        base=base("bf16"),
    ),
)
