"""What README and pages show is what happens: their code is run.

CONTRIBUTING.md says for authors of pages which names a block may use, and what is done with it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

import peftstate
from peftstate import errors
from peftstate._demo.tiny import tiny_checkpoint
from peftstate.cli.app import app
from tests.docs._pages import PAGES, blocks_of, with_blocks

LANGUAGES = {"console", "json", "python", "sh", "text"}
RUN_ELSEWHERE = {
    "docs/hub.md",  # tests/hub/test_docs.py, with a Hub
    "docs/mlflow.md",  # tests/integrations/test_mlflow.py, which undoes what it registers
    "docs/sections.md",  # tests/docs/test_sections.py, in a copy of the repository
}
FRESH = {"base", "fresh_base"}
"""Names that stand for another model each time that they are used."""


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    """So that none is passed over."""
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


@pytest.mark.parametrize("page", with_blocks("json"))
def test_json_can_be_read(page):
    """An example of JSON is JSON."""
    for block in blocks_of(page):
        if block.language == "json":
            json.loads(block.code)


# Python, and commands with their output


class Names(dict[str, Any]):
    """The names of a page's program; those that it need not make are made when they are used."""

    def __init__(self, makers, names):
        super().__init__(names)
        self.makers = makers

    def __missing__(self, name):
        """Make a value, and keep it if it is not to be another one each time."""
        value = self.makers[name]()
        if name not in FRESH:
            self[name] = value
        return value


@pytest.fixture(scope="module")
def adapter(load_base, with_lora, tmp_path_factory):
    """The folder of an adapter on a base model in nf4."""
    folder = tmp_path_factory.mktemp("adapter")
    with_lora(load_base("nf4")).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def names(load_base, adapter, tmp_path, monkeypatch):
    """What all pages may use, in a folder that they may write to."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "adapter")
    _write_keys()

    def load():
        return load_base("nf4")

    makers = {
        "base": load,
        "fresh_base": load,
        "model": lambda: peftstate.PeftModel.from_pretrained(load(), "adapter"),
    }
    given = {
        "input_ids": torch.tensor([[4, 5, 6]]),
        "lora_config": peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
        "path": "adapter",
        "seed": 3,
    }
    yield Names(makers, given)
    peftstate.uninstall()


def _write_keys():
    """Make the keys that pages sign with."""
    private = Ed25519PrivateKey.generate()
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    pkcs8, spki = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    Path("key.pem").write_bytes(private.private_bytes(pem, pkcs8, plain))
    Path("key.pub").write_bytes(private.public_key().public_bytes(pem, spki))


def _page(page):
    """A page as a parameter, with what it does not run on."""
    too_old = page == "docs/distributed.md" and transformers.__version__.startswith("4.")
    reason = "torch cannot list the state of a model that bitsandbytes 0.47 quantized"
    return pytest.param(page, marks=pytest.mark.skipif(too_old, reason=reason))


@pytest.mark.parametrize(
    "page", [_page(p) for p in with_blocks("python", "console") if p not in RUN_ELSEWHERE]
)
def test_the_code_runs(page, names):
    """A page's blocks run one after the other, and print what the page says."""
    printed = ""
    with _only_our_warnings():
        for block in blocks_of(page):
            for text, prepare in PREPARED.get(page, {}).items():
                if text in block.code:
                    prepare(names)
            if block.language == "python":
                printed = _run(block.code, names)
            elif block.language == "text" and block.follows:
                assert printed == block.code
            elif block.language == "console":
                _compare_console(block.code)


@contextlib.contextmanager
def _only_our_warnings():
    """A page gives rise to no warning of ours, but that of train mode; others' may come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", errors.PeftStateWarning)
        warnings.simplefilter("ignore", errors.TrainModeWarning)
        yield


def _run(code, names):
    """Run a block, and give what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "<block>", "exec"), names, names)  # noqa: S102 - the page's own code
    return output.getvalue()


def _compare_console(code):
    """Run our commands of a block, and compare what they print; `…` stands for anything."""
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", code, re.MULTILINE):
        program, *arguments = shlex.split(command)
        if program == "peftstate" and arguments[0] != "probe":  # which needs a server
            result = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(app, arguments)
            pattern = ".*".join(map(re.escape, expected.split("…")))
            assert re.fullmatch(pattern, result.output, re.DOTALL), result.output


def test_the_readme_shows_an_error_as_it_is(load_base, adapter):
    """It is what a base model in fp4 raises, where the adapter was trained in nf4."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    )
    base = load_base("bf16", quantization_config=config)
    with pytest.raises(errors.QuantizationMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(base, adapter)
    assert f"peftstate.errors.QuantizationMismatchError: {caught.value}\n" in PAGES["README.md"]


# What some pages need besides


def _anew(names):
    """The adapter's folder, and the model, as they were in the beginning."""
    names.pop("model", None)
    shutil.rmtree("adapter")
    names["model"] = peftstate.get_peft_model(names["base"], names["lora_config"])
    names["model"].save_pretrained("adapter")


def _another_adapter(names):
    """A second adapter for the same base model."""
    _anew(names)
    names["model"].save_pretrained("another-adapter")


def _for_trl(names):
    """A model with its tokenizer, for `SFTTrainer`, and texts."""
    trl = pytest.importorskip("trl")
    import datasets

    names["model"] = tiny_checkpoint(Path("tiny"))
    # By default it wants a GPU.
    args = trl.SFTConfig(output_dir="run", max_steps=1, use_cpu=True, bf16=False, report_to=[])
    names["SFTTrainer"] = functools.partial(trl.SFTTrainer, args=args)
    names["config"] = peft.LoraConfig(task_type="CAUSAL_LM")
    names["data"] = datasets.Dataset.from_dict({"text": ["The baker opened the window."] * 8})


def _for_accelerate(names):
    """What a training script prepares."""
    import accelerate

    names["accelerator"] = accelerate.Accelerator(cpu=True)
    names["optimizer"] = torch.optim.SGD(names["model"].parameters())
    names["loader"] = torch.utils.data.DataLoader([1, 2])


def _first_rank(names):
    """The number of a process among several."""
    names["rank"] = 0


def _two_saves(names):
    """An adapter before and after."""
    shutil.copytree("adapter", "before")
    shutil.copytree("adapter", "after")


def _base_path(names):
    """Where the base model is, and a second adapter for it."""
    names["base_path"] = names["base"].config._name_or_path
    shutil.copytree("adapter", "another-adapter")


def _plain_adapter(names):
    """An adapter that has no manifest."""
    ours = shutil.ignore_patterns("peftstate.*")
    shutil.copytree("adapter", "plain-adapter", ignore=ours)


def _poet(names):
    """An adapter on a base model of the Hub's, which vLLM can serve."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        names["base"].config._name_or_path, dtype=torch.bfloat16
    )
    base.config._name_or_path = base.name_or_path = "org/base"
    names["model"] = peftstate.get_peft_model(base, names["lora_config"])
    names["model"].save_pretrained("adapters/poet")


PREPARED = {
    "README.md": {
        "SFTTrainer(": _for_trl,
        "peftstate.install()": _anew,
        "another-adapter": _another_adapter,
        "peftstate.verify(": _anew,
    },
    "docs/distributed.md": {"get_model_state_dict": _first_rank, "register": _for_accelerate},
    "docs/manifest.md": {'read_manifest("before")': _two_saves},
    "docs/serving.md": {"base_model_kwargs(": _base_path, "plain-adapter": _plain_adapter},
    "docs/training.md": {"SFTTrainer(": _for_trl},
    "docs/vllm.md": {"vllm-args": _poet},
}
"""By page, what is done before a block that contains a text."""
