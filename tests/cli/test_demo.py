"""``peftstate demo``; what it measures is tested in `tests/test_demo.py`."""

from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner

import peftstate
from peftstate.cli.app import app


def test_it_runs_and_ends_with_the_table(tmp_path):
    """It says what it does, keeps the adapter where it is told to, and both reloads are exact."""
    runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"})
    result = runner.invoke(app, ["demo", "--steps", "1", "--output", str(tmp_path / "adapter")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3] == [
        "making a tiny Llama",
        "training a QLoRA adapter for 1 steps: nf4, double quantization, bf16",
        "saving it",
    ]
    row = next(line for line in lines if "max |Δ logits|" in line)
    assert [cell.strip() for cell in row.split("│")][-3:] == ["0.0", "0.0", ""]
    assert peftstate.verify_files(tmp_path / "adapter").ok


def test_it_says_that_it_takes_trl():
    """Which peftstate itself does not need."""
    code = "import sys\nsys.modules['trl'] = None\nfrom peftstate.cli.app import app\napp(['demo'])"
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.returncode == 3
    assert result.stderr.splitlines()[-1] == (
        "The demo trains with TRL: pip install 'peftstate[trl]'"
    )
