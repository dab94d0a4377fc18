"""A diagnosis that was not measured, and what several tests of diagnoses do to a model."""

from __future__ import annotations

from peftstate._diagnosis import Cause, Diagnosis, Effect


def in_bfloat16(model):
    """Cast the adapters, as TRL does for 4-bit models."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model


def effect(largest, agreement=1.0):
    """An effect of some size."""
    return Effect(max_difference=largest, kl_divergence=largest / 50, top1_agreement=agreement)


DIAGNOSIS = Diagnosis(
    adapter="adapter",
    model="plain PEFT on the base model as it is loaded by default",
    inputs="a row of 16 ids",
    failure="",
    total=effect(19.75, 0.625),
    rest=effect(0.0),
    causes=(
        Cause(
            name="quantization type",
            section="quantization",
            saved="nf4",
            found="fp4",
            remedy="Quantize it as it was.",
            effect=effect(19.5, 0.625),
        ),
        Cause(
            name="adapter dtype",
            section="dtype",
            saved="bfloat16",
            found="float32",
            remedy="Do not cast it.",
            effect=effect(0.59),
        ),
        Cause(
            name="attention",
            section="implementation",
            saved="eager",
            found="sdpa",
            remedy="Set it.",
            effect=effect(0.0),
        ),
        Cause(
            name="train mode",
            section="training",
            saved="train",
            found="eval",
            remedy="Compare in eval mode.",
            effect=effect(1.25, 0.9995),
            note="both modes with the saved random numbers",
            in_total=False,
        ),
    ),
    unmeasured=(
        Cause(
            name="random numbers",
            section="rng",
            saved="1",
            found="2",
            remedy="Restore them.",
            effect=None,
            note="changes sampled text and dropout: torch_cpu.digest",
        ),
    ),
)
"""One that has something of everything."""
