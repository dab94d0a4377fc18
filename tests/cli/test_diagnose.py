"""``peftstate diagnose``: the table, the exit codes, the chart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftstate._diagnosing import run as diagnosing
from peftstate.cli.app import app
from tests._diagnosis import DIAGNOSIS, in_bfloat16

GOLDEN = Path(__file__).parent.parent / "golden" / "schema-1"

TEXT = """\
The predictions differ: max |Δ logits| 19.8, KL 0.4, top-1 62.5%.
plain PEFT on the base model as it is loaded by default; a row of 16 ids

 cause              section         saved → found       max |Δ|     KL  top-1
 ────────────────────────────────────────────────────────────────────────────
 quantization type  quantization    nf4 → fp4              19.5   0.39  62.5%
 adapter dtype      dtype           bfloat16 → float32     0.59  0.012   100%
 attention          implementation  eager → sdpa              0      0   100%

 all together                                              19.8    0.4  62.5%

 train mode         training        train → eval           1.25  0.025  99.9%


how it was measured
  train mode  both modes with the saved random numbers

what to do
  quantization type  Quantize it as it was.
  adapter dtype      Do not cast it.
  train mode         Compare in eval mode.

differs too
  random numbers  changes sampled text and dropout: torch_cpu.digest
"""


def run(*arguments):
    """Run the program in this process, on a terminal of the usual width."""
    environment = {"COLUMNS": "80", "NO_COLOR": "1"}
    return CliRunner(env=environment).invoke(app, ["diagnose", *map(str, arguments)])


@pytest.fixture
def folder(load_base, with_lora, tmp_path):
    """An adapter in bfloat16, which PEFT casts."""
    in_bfloat16(with_lora(load_base("bf16"))).eval().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_table(monkeypatch):
    """Above the total what is in it, below it what is not, and then words."""
    monkeypatch.setattr(diagnosing, "diagnose", lambda *_, **__: DIAGNOSIS)
    result = run("adapter")
    assert [line.rstrip() for line in result.stdout.splitlines()] == TEXT.splitlines()
    assert result.exit_code == 1


def test_a_difference(folder):
    """It is named, and the exit code is 1."""
    result = run(folder, "--as-plain-peft")
    assert result.exit_code == 1
    assert "adapter dtype" in result.stdout
    assert "bfloat16 → float32" in result.stdout


def test_nothing_differs(load_base, with_lora, tmp_path):
    """The exit code is 0."""
    with_lora(load_base("fp32")).eval().save_pretrained(tmp_path)
    result = run(tmp_path, "--as-plain-peft")
    assert result.exit_code == 0
    assert result.stdout.startswith("The predictions are the same, to the last bit.\n")


def test_for_other_programs(folder, causal_lm):
    """As JSON."""
    result = run(folder, "--base", causal_lm, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    causes = {cause["name"]: cause for cause in found["causes"]}
    assert causes["adapter dtype"]["found"] == "float32"
    assert causes["adapter dtype"]["effect"]["max_difference"] > 0
    assert found["rest"]["max_difference"] == 0


def test_a_chart(folder, tmp_path):
    """It is written, and said so."""
    result = run(folder, "--plot", tmp_path / "chart.png")
    assert result.stdout.endswith(f"Wrote {tmp_path / 'chart.png'}.\n")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_of_no_format(folder, tmp_path):
    """What cannot be drawn is no success."""
    result = run(folder, "--plot", tmp_path / "chart.colour")
    assert result.exit_code == 3
    assert "'colour' is not supported" in result.stderr


def test_a_base_model_that_is_nowhere():
    """The message says which, and what to do."""
    result = run(GOLDEN / "causal-lm")
    assert result.exit_code == 1
    start = "AdapterLoadError: base_model: its base model 'base-llama' is not to be had ("
    assert result.stderr.startswith(start)
    assert result.stderr.endswith("); pass base= to say where it is\n")


def test_without_a_manifest(tmp_path):
    """There is nothing to compare with."""
    (tmp_path / "adapter_config.json").write_text("{}")
    result = run(tmp_path)
    assert result.exit_code == 3
    assert result.stderr.startswith("ManifestNotFoundError: ")


def test_wrong_usage():
    """An option that there is not."""
    assert run("adapter", "--colour").exit_code == 2


def test_help_needs_no_torch():
    """torch is imported when there is a model to load."""
    code = (
        "import sys\nfrom peftstate.cli.app import app\n"
        "app(['diagnose', '--help'], standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
