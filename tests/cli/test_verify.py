"""``peftstate verify``: adapters' files, one adapter or thousands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftstate.cli.app import app
from peftstate.cli.verify import _MANY

GOLDEN = Path(__file__).parent.parent / "golden" / "schema-1"


def run(*arguments):
    """Run the program in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, arguments)


def test_verify_a_good_adapter():
    """A line, and exit code 0."""
    result = run("verify", str(GOLDEN / "classifier"))
    assert result.exit_code == 0
    assert result.output.splitlines()[0].split() == ["ok", str(GOLDEN / "classifier")]


@pytest.fixture
def folders(tmp_path):
    """Adapters of every kind, below one folder: good, damaged, of plain PEFT."""
    shutil.copytree(GOLDEN / "two-adapters", tmp_path / "a" / "good")
    shutil.copytree(GOLDEN / "classifier", tmp_path / "b" / "damaged")
    weights = tmp_path / "b" / "damaged" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    (tmp_path / "c" / "plain").mkdir(parents=True)
    (tmp_path / "c" / "plain" / "adapter_config.json").write_text("{}")
    (tmp_path / "c" / "no-adapter").mkdir()
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo terminals")
def test_verify_in_a_terminal(folders):
    """The bar that shows the progress, and what is printed, do not share a line."""
    lines = in_a_terminal(folders)
    assert any(line.startswith("Verifying ") for line in lines)
    assert [line for line in lines if "good" in line] == [
        f"ok           {folders / 'a' / name}" for name in ("good", "good/ref")
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo terminals")
def test_verify_without_a_bar(folders):
    """The setting of huggingface_hub switches it off."""
    lines = in_a_terminal(folders, HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert not any("Verifying" in line for line in lines)
    assert lines[0] == f"ok           {folders / 'a' / 'good'}"


def in_a_terminal(folders, **settings):
    """What verifying all adapters below a folder prints in a terminal, line by line."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "peftstate", "verify", "--recursive", str(folders)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", **settings}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # which stands for the end
            while data := os.read(ours, 1000):
                printed += data
    os.close(ours)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", printed.decode()))


def test_verify_all_below(folders):
    """Each adapter has its line in order, what fails says why, and a summary ends it."""
    result = run("verify", "--recursive", str(folders))
    lines = result.output.splitlines()
    verdicts = [line.rsplit(maxsplit=1) for line in lines if not line.startswith(" ")][:-1]
    assert [(word.strip(), Path(path).name) for word, path in verdicts] == [
        ("ok", "good"),
        ("ok", "ref"),
        ("DIFFERS", "damaged"),
        ("NOT VERIFIED", "plain"),
    ]
    assert any(line.startswith("  files[adapter_model.safetensors]") for line in lines)
    assert lines[-1] == "4 adapters: 2 ok, 1 differ, 1 not verified."
    assert result.exit_code == 1


def test_verify_exit_codes(folders):
    """Damage is 1, nothing to verify by is 3, and a folder without any adapter is no success."""
    assert run("verify", "-r", str(folders / "a")).exit_code == 0
    assert run("verify", str(folders / "b" / "damaged")).exit_code == 1
    assert run("verify", "-r", str(folders / "a"), str(folders / "c")).exit_code == 3
    assert run("verify", "-r", str(folders / "c" / "no-adapter")).exit_code == 3


def test_verify_for_other_programs(folders):
    """As JSON, an object an adapter, with its differences."""
    found = json.loads(run("verify", "-r", "--json", str(folders)).output)
    assert [item["ok"] for item in found] == [True, True, False, False]
    assert found[2]["mismatches"][0]["field"] == "[adapter_model.safetensors].sha256"
    assert found[3]["error"].startswith("ManifestNotFoundError: ")


def test_verify_many(folders):
    """Where processes share the work, each adapter has its line, in order."""
    for number in range(_MANY):
        shutil.copytree(GOLDEN / "causal-lm", folders / "many" / f"{number:03}")
    (folders / "many" / "077" / "adapter_model.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "peftstate", "verify", "-r", "--json", str(folders / "many")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert [Path(item["source"]).name for item in found] == [f"{n:03}" for n in range(_MANY)]
    assert [number for number, item in enumerate(found) if not item["ok"]] == [77]
