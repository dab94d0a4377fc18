"""``peftstate base-args``: the call that loads the base model of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from typer.testing import CliRunner

import peftstate
from peftstate.cli.app import app

GOLDEN = Path(__file__).parent.parent / "golden" / "schema-1"


def run(*arguments):
    """Run the program in this process."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["base-args", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_call_is_that_of_base_model_kwargs(monkeypatch):
    """The printed code runs as it stands, with the arguments of `base_model_kwargs`."""
    calls = []
    monkeypatch.setattr(
        transformers.LlamaForCausalLM,
        "from_pretrained",
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    names = {
        "BitsAndBytesConfig": transformers.BitsAndBytesConfig,
        "LlamaForCausalLM": transformers.LlamaForCausalLM,
        "torch": torch,
    }
    exec(run(GOLDEN / "nf4-kbit"), names)  # noqa: S102
    ((name,), kwargs) = calls[0]
    expected = peftstate.base_model_kwargs(GOLDEN / "nf4-kbit")
    assert name == "base-llama"
    assert kwargs.pop("quantization_config").to_dict() == (
        expected.pop("quantization_config").to_dict()
    )
    assert kwargs == expected


def test_for_other_programs():
    """As JSON, with dtypes by their names."""
    found = json.loads(run(GOLDEN / "nf4-kbit", "--json"))
    assert found["dtype"] == "bfloat16"
    assert found["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
