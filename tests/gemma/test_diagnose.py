"""`diagnose` on a real Gemma, in the flow of TRL's `SFTTrainer`."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peftstate
from peftstate._demo import flow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        transformers.__version__.startswith("4."),
        reason="TRL 0.22 trains the adapter in float32, as PEFT loads it",
    ),
]


def test_plain_peft_differs_by_the_adapters_dtype(trained):
    """With the same `BitsAndBytesConfig`, the dtype that PEFT casts to is the whole difference."""
    found = peftstate.diagnose(
        trained.saved.adapter, as_plain_peft=True, prediction_probe=flow.PROMPT
    )
    assert [(cause.name, cause.in_total) for cause in found.causes] == [
        ("adapter dtype", True),
        ("train mode", False),
    ]
    (cause, _) = found.causes
    assert (cause.saved, cause.found) == ("bfloat16", "float32")
    assert cause.effect == found.total
    assert found.rest.is_none

    plain = flow.reload(flow.RELOADS[0], trained.saved)
    assert cause.effect.max_difference == plain.logit_difference > 0.1


@pytest.mark.parametrize("kind", ["unquantized", "fp4"])
def test_a_wrong_base_differs_by_its_quantization(trained, checkpoint, kind):
    """Quantization comes first, with a number of its own, and nothing is left to explain."""
    users = None
    if kind == "fp4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        base = AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=config, dtype=torch.bfloat16
        )
        users = peft.PeftModel.from_pretrained(base, trained.saved.adapter)
    found = peftstate.diagnose(trained.saved.adapter, users, prediction_probe=flow.PROMPT)
    names = {"unquantized": "quantization", "fp4": "quantization type"}
    assert [cause.name for cause in found.causes] == [names[kind], "adapter dtype", "train mode"]
    first, second, _ = found.causes
    assert first.effect.max_difference > 5 * second.effect.max_difference > 0
    assert found.rest.is_none
