"""``peftstate run``: scripts and modules behind `install`, unedited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

import peftstate
from peftstate.cli.app import app

PROBE = """
import json, sys
import peft
print(json.dumps({
    "argv": sys.argv,
    "name": __name__,
    "path": sys.path[0],
    "installed": hasattr(peft.PeftModel.save_pretrained, "__wrapped__"),
}))
"""


def peftstate_run(*arguments, cwd=None):
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "peftstate", "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "200"},
    )


@pytest.fixture
def probe(tmp_path):
    """A script that prints how it was started; also a module of the folder it is in."""
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path / "probe.py"


def test_a_script_runs_as_python_runs_it(probe):
    """Its name, arguments and import path are what they are under `python`; PEFT is wrapped."""
    done = peftstate_run("--on-mismatch", "rng=ignore", probe, "--require-manifest", "-m", "x")
    assert json.loads(done.stdout) == {
        "argv": [str(probe), "--require-manifest", "-m", "x"],
        "name": "__main__",
        "path": str(probe.parent),
        "installed": True,
    }


def test_a_module_runs_as_python_runs_it(probe):
    """All that follows the module's name is for the module."""
    done = peftstate_run("-m", "probe", "--on-mismatch", "nothing", cwd=probe.parent)
    found = json.loads(done.stdout)
    assert found["argv"] == [str(probe), "--on-mismatch", "nothing"]
    assert (found["name"], found["installed"]) == ("__main__", True)


def test_the_exit_code_and_the_traceback_are_the_scripts(tmp_path):
    """A script that fails fails in the same way."""
    (tmp_path / "exits.py").write_text("raise SystemExit(7)")
    assert peftstate_run(tmp_path / "exits.py").returncode == 7
    (tmp_path / "raises.py").write_text("{}['missing']")
    done = peftstate_run(tmp_path / "raises.py")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'missing'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to run: a script, or -m and a module"),
        (["nothing.py"], "there is no script 'nothing.py'"),
        (["--trusted-key", "no.pem", "-m", "json"], "No such file or directory: 'no.pem'"),
        (["--on-mismatch", "weights=warn", "-m", "json"], "there is no section 'weights'"),
        (["--on-mismatch", "loud", "-m", "json"], "'loud' is none of ('error', 'warn', 'ignore')"),
        (
            ["--on-mismatch", "warn", "--on-mismatch", "rng=warn", "-m", "json"],
            "--on-mismatch warn is for all sections; say it alone",
        ),
    ],
)
def test_wrong_usage_is_told(arguments, message):
    """What cannot be meant is refused before anything runs."""
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["run", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(version("trl") < "1", reason="TRL 0.22's script does not start by itself")
def test_trls_own_script_is_reached(tmp_path):
    """`trl.scripts.sft`, which knows nothing of us, leaves checkpoints with manifests."""
    from peftstate._demo.tiny import SENTENCES, tiny_checkpoint

    tiny_checkpoint(tmp_path / "base")
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps({"text": text}) for text in SENTENCES]
    (data / "train.jsonl").write_text("\n".join(rows))
    done = peftstate_run(
        *("-m", "trl.scripts.sft", "--model_name_or_path", tmp_path / "base"),
        *("--dataset_name", data, "--output_dir", tmp_path / "run", "--use_peft"),
        *("--load_in_4bit", "--max_steps", "2", "--save_steps", "1", "--use_cpu", "true"),
        *("--report_to", "none", "--gradient_checkpointing", "false", "--bf16", "false"),
    )
    assert done.returncode == 0, done.stderr
    for folder in ("checkpoint-1", "checkpoint-2", "."):
        assert peftstate.verify_files(tmp_path / "run" / folder).ok
    manifest = peftstate.read_manifest(tmp_path / "run")
    assert manifest.sections["quantization"].layers
    assert manifest.sections["tokenizer"].size > 256
