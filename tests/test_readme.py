"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
import transformers

import peftstate

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture
def blocks(load_base, tmp_path, monkeypatch):
    """Runs the README's blocks of Python that hold a text, one after the other."""
    monkeypatch.chdir(tmp_path)

    names = {
        "base": load_base("nf4"),
        "input_ids": torch.tensor([[4, 5, 6]]),
        "lora_config": peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    }

    def run(text):
        (block,) = [
            code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in code
        ]
        for line in re.split(r"\n(?=\S)", block):
            names["fresh_base"] = load_base("nf4")
            exec(line, names)  # noqa: S102 - the README's own code
        return names

    return run


def test_the_example_runs(blocks):
    """The eight lines of use save and load."""
    model = blocks("lora_config")["model"]
    assert type(model) is peftstate.PeftModelForCausalLM
    assert not model.training


def test_the_functions_run(blocks):
    """Verify, restore, compare, and evaluate."""
    blocks("lora_config")
    names = blocks("peftstate.verify(")
    assert isinstance(names["report"], peftstate.Report)
    assert names["model"].training


def test_the_error_is_printed_as_it_is(blocks, load_base):
    """The error in the README is what a base model in fp4 raises."""
    blocks("lora_config")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    )
    with pytest.raises(peftstate.errors.QuantizationMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(
            load_base("bf16", quantization_config=config), "adapter"
        )
    name = f"peftstate.errors.{type(caught.value).__name__}"
    assert f"{name}: {caught.value}" in README
