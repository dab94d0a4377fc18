"""Further situations: other models, and other tasks."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.fidelity._models import (
    IDS,
    Place,
    adapted,
    base,
    lora,
    outputs,
    train,
    trained_lora,
)
from benchmarks.fidelity._situation import Situation

IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
NUMBERS = torch.linspace(-1, 1, 3 * 8).reshape(3, 8)


class Perceptron(torch.nn.Module):
    """A model that is none of transformers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.nn.Linear(8, 16)
        self.output = torch.nn.Linear(16, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute outputs and a loss."""
        outputs = self.output(torch.relu(self.hidden(inputs)))
        return {"outputs": outputs, "loss": outputs.square().sum()}


def perceptron(_: Place) -> Any:
    """A plain `nn.Module` with an adapter, trained."""
    model = adapted(Perceptron(), lora(target_modules=["hidden"], task_type=None))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _step in range(2):
        model(NUMBERS)["loss"].backward()
        optimizer.step()
    return model


def _task(
    *,
    title: str,
    base: dict[str, Any],
    config: dict[str, Any],
    inputs: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    names: tuple[str, ...] = ("logits",),
) -> Situation:
    """A task, on a base model whose checkpoint has mostly no head for it."""
    return Situation(
        title=title,
        build=lambda place: train(adapted(place.load(**base), lora(**config)), **inputs, **labels),
        base=lambda place: place.load(**base),
        answers=lambda model: outputs(model, *names, **inputs),
    )


SITUATIONS = (
    _task(
        title="BERT, a sequence classifier",
        base={
            "checkpoint": "bert",
            "auto_class": "AutoModelForSequenceClassification",
            "num_labels": 3,
        },
        config={"task_type": "SEQ_CLS", "target_modules": ["query"]},
        inputs={"input_ids": IDS},
        labels={"labels": torch.tensor([1, 2])},
    ),
    _task(
        title="BERT, a token classifier",
        base={
            "checkpoint": "bert",
            "auto_class": "AutoModelForTokenClassification",
            "num_labels": 3,
        },
        config={"task_type": "TOKEN_CLS", "target_modules": ["query"]},
        inputs={"input_ids": IDS},
        labels={"labels": IDS % 3},
    ),
    _task(
        title="BERT, answers to questions",
        base={"checkpoint": "bert", "auto_class": "AutoModelForQuestionAnswering"},
        config={"task_type": "QUESTION_ANS", "target_modules": ["query"]},
        inputs={"input_ids": IDS},
        labels={"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        names=("start_logits", "end_logits"),
    ),
    _task(
        title="BERT, multiple choice, its head in `modules_to_save`",
        base={"checkpoint": "bert", "auto_class": "AutoModelForMultipleChoice"},
        config={"task_type": None, "target_modules": ["query"], "modules_to_save": ["classifier"]},
        inputs={"input_ids": IDS[None]},
        labels={"labels": torch.tensor([1])},
    ),
    _task(
        title="ViT, a classifier of images, its head in `modules_to_save`",
        base={
            "checkpoint": "vit",
            "auto_class": "AutoModelForImageClassification",
            "num_labels": 3,
        },
        config={
            "task_type": None,
            "target_modules": ["query", "q_proj"],  # before and since transformers 5
            "modules_to_save": ["classifier"],
        },
        inputs={"pixel_values": IMAGES},
        labels={"labels": torch.tensor([1, 2])},
    ),
    _task(
        title="T5, with encoder and decoder",
        base={"checkpoint": "t5", "auto_class": "AutoModelForSeq2SeqLM"},
        config={"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]},
        inputs={"input_ids": IDS, "decoder_input_ids": IDS},
        labels={"labels": IDS},
    ),
    Situation(
        title="a plain `nn.Module`",
        build=perceptron,
        base=lambda _: Perceptron(),
        answers=lambda model: outputs(model, "outputs", inputs=NUMBERS),
    ),
    Situation(
        title="a Llama in fp16",
        build=trained_lora(base("fp16")),
        base=base("fp16"),
    ),
)
