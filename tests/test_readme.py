"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import peftstate
from peftstate.cli.app import app

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture
def blocks(load_base, tmp_path, monkeypatch):
    """Runs the README's blocks of Python that hold a text, one after the other."""
    monkeypatch.chdir(tmp_path)

    names = {
        "base": load_base("nf4"),
        "input_ids": torch.tensor([[4, 5, 6]]),
        "peftstate": peftstate,
        "lora_config": peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    }

    def run(text):
        (block,) = [
            code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in code
        ]
        for line in re.split(r"\n(?=[^\s)])", block):
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


def test_the_serving_block_runs(blocks):
    """An adapter is loaded into a live model, and a request has its own stream."""
    names = blocks("lora_config")
    names["model"].save_pretrained("another-adapter")
    names["seed"] = 3
    assert list(blocks("request_rng")["model"].peft_config) == ["default", "another"]


def test_the_signing_block_runs(blocks):
    """What was signed is loaded with the public key."""
    blocks("lora_config")
    private = Ed25519PrivateKey.generate()
    Path("key.pem").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    Path("key.pub").write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    blocks("sign_with")
    assert Path("adapter", "model.sig").exists()


def test_the_install_block_runs(blocks):
    """After it, PEFT's own class loads with the whole state."""
    names = blocks("lora_config")
    try:
        blocks("peftstate.install()")
        loaded = peft.PeftModel.from_pretrained(names["fresh_base"], "adapter")
    finally:
        peftstate.uninstall()
    assert isinstance(loaded, peftstate.PeftModel)


def test_the_commands_exist():
    """Each command that the README shows is one of the program's."""
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    shown = set(re.findall(r"^peftstate ([a-z-]+)", shell, re.MULTILINE))
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert shown
    assert shown <= {name.replace("_", "-") for name in known}
