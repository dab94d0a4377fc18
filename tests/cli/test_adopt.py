"""``peftstate adopt``."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from typer.testing import CliRunner

import peftstate
from peftstate.cli.app import app


def run(*arguments):
    """Run the program in this process."""
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    return runner.invoke(app, ["adopt", *map(str, arguments)])


@pytest.fixture
def plain(load_base, tmp_path):
    """The folder of an adapter that plain PEFT saved."""
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load_base("bf16"), config).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_what_is_stated_is_recorded(plain, causal_lm):
    """It says on what the adapter was adopted, and what nobody knows; a load quantizes like it."""
    stated = ("--quantization", "nf4", "--double-quant", "--compute-dtype", "bfloat16")
    more = ("--dtype", "bfloat16", "--attn-implementation", "eager", "--prediction-probe")
    result = run(plain, "--base", causal_lm, *stated, *more)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"{plain}: adopted, on {causal_lm.name} in nf4\n"
        "  not known any more: training, generation, runtime, rng\n"
    )
    kwargs = peftstate.base_model_kwargs(plain)
    assert kwargs["quantization_config"].bnb_4bit_quant_type == "nf4"
    assert kwargs["quantization_config"].bnb_4bit_use_double_quant
    assert kwargs["quantization_config"].bnb_4bit_compute_dtype is torch.bfloat16
    assert (kwargs["dtype"], kwargs["attn_implementation"]) == (torch.bfloat16, "eager")
    model = peftstate.AutoPeftModelForCausalLM.from_pretrained(plain)
    assert peftstate.verify(model, plain).ok


def test_in_8_bits(plain):
    """The base model that the adapter names, in int8."""
    result = run(plain, "--quantization", "int8", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert peftstate.base_model_kwargs(plain)["quantization_config"].load_in_8bit


def test_for_other_programs(plain):
    """With --json it is the seal, and the sections that are not known."""
    found = json.loads(run(plain, "--json").stdout)
    manifest = peftstate.read_manifest(plain)
    unknown = ["training", "generation", "runtime", "rng"]
    assert found == {"source": str(plain), "digest": manifest.digest, "unknown": unknown}


def test_a_second_time(plain):
    """A manifest is not replaced."""
    run(plain)
    result = run(plain)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"ManifestExistsError: {plain / 'peftstate.json'}: there is a")


def test_nothing_to_adopt(tmp_path):
    """There is no such folder."""
    assert run(tmp_path / "none").exit_code == 3


@pytest.mark.parametrize("options", [["--double-quant"], ["--compute-dtype", "float16"]])
def test_options_of_4_bits_without_them(plain, options):
    """They would do nothing."""
    result = run(plain, *options)
    assert result.exit_code == 2
    assert "--double-quant and --compute-dtype are for nf4 and fp4" in result.stderr


def test_show_says_that_it_was_adopted(plain):
    """And what is not known of it, on a terminal and on a page."""
    run(plain)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    lines = runner.invoke(app, ["show", str(plain)]).stdout.splitlines()
    version = peftstate.__version__
    assert lines[0] == f"{plain}: adopted by peftstate {version}, schema 3"
    place = lines.index("rng")
    assert lines[place + 1].strip() == "not known  neither restored nor compared by a load"
    html = peftstate.read_manifest(plain)._repr_html_()
    assert f"<p>Adopted by peftstate {version}, schema 3.</p>" in html
