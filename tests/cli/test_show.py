"""``peftstate show``, ``diff`` and ``schema``: reading, without torch."""

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

import peftstate
from peftstate import _schema
from peftstate.cli.app import app
from peftstate.cli.diff import EFFECTS, _lines
from peftstate.sections import SECTIONS

GOLDEN = Path(__file__).parent.parent / "golden" / "schema-1"
ADAPTER = str(GOLDEN / "causal-lm")
OTHER = str(GOLDEN / "classifier")


def run(*arguments):
    """Run the program in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, arguments)


def test_show_says_what_was_saved():
    """A person sees the sections, what matters in them, and the files."""
    result = run("show", str(GOLDEN / "nf4-kbit"))
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "quantization" in lines
    assert "config.bnb_4bit_quant_type nf4" in lines
    assert "model_class LlamaForCausalLM" in lines
    assert any(line.startswith("adapter_model.safetensors 2,576 bytes sha256") for line in lines)


def test_show_for_other_programs():
    """With --json it is the manifest, as `read_manifest` gives it."""
    result = run("show", ADAPTER, "--json")
    manifest = peftstate.read_manifest(ADAPTER)
    assert json.loads(result.output) == json.loads(manifest.to_json())


def test_show_writes_a_page(tmp_path):
    """With --html it is a page that needs no other file."""
    result = run("show", ADAPTER, "--html", str(tmp_path / "out.html"))
    assert result.output == f"Wrote {tmp_path / 'out.html'}.\n"
    source = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "LlamaForCausalLM" in source
    assert "<details>" not in source, "a page shows what it has, without a click"


def test_show_without_a_manifest(tmp_path):
    """An adapter of plain PEFT has nothing to show; that is not a success."""
    (tmp_path / "adapter_config.json").write_text("{}")
    result = run("show", str(tmp_path))
    assert result.exit_code == 3
    assert result.output.startswith("ManifestNotFoundError: ")


def test_diff_groups_by_effect():
    """What changes the predictions comes first, and the exit code says that there is something."""
    result = run("diff", ADAPTER, OTHER)
    assert result.exit_code == 1
    heads = [line for line in result.output.splitlines() if not line.startswith(" ")]
    assert heads[0] == "changes the predictions"
    assert heads == [effect for effect in EFFECTS if effect in heads]
    assert "base_model.model_class: saved 'LlamaForCausalLM', found" in result.output


def test_diff_shows_a_few_of_a_kind():
    """Of many tensors that differ a few lines, and how many more there are; JSON has all."""
    tensors = [
        peftstate.Mismatch("base_model", f"tensors[{name}].digest", 1, 2) for name in "abcdef"
    ]
    lines = list(_lines([*tensors, peftstate.Mismatch("dtype", "base.default", 1, 2)]))
    assert lines == [
        *map(str, tensors[:4]),
        "… and 2 more of base_model.tensors[…].digest",
        "dtype.base.default: saved 1, found 2",
    ]


def test_diff_of_the_same():
    """Nothing differs: said, and exit code 0."""
    result = run("diff", ADAPTER, ADAPTER)
    assert (result.exit_code, result.output) == (0, "The saved states are the same.\n")


def test_diff_for_other_programs(tmp_path):
    """As JSON, one object a difference, absent values left out; or as a page."""
    found = json.loads(run("diff", ADAPTER, OTHER, "--json").output)
    expected = peftstate.diff(peftstate.read_manifest(ADAPTER), peftstate.read_manifest(OTHER))
    assert [(item["section"], item["field"]) for item in found] == [
        (mismatch.section, mismatch.field) for mismatch in expected.mismatches
    ]
    assert "saved" not in next(item for item in found if "LABEL_2" in item["field"])
    result = run("diff", ADAPTER, OTHER, "--html", str(tmp_path / "out.html"))
    assert result.exit_code == 1
    assert "changes the predictions" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_every_section_has_an_effect():
    """A new section is put into one group of `diff`."""
    sections = [section for group in EFFECTS.values() for section in group]
    assert sorted(sections) == sorted(section.name for section in SECTIONS)


def test_schema_is_the_packages():
    """The JSON Schema is that of the file in the package."""
    assert json.loads(run("schema").output) == json.loads(_schema.FILE.read_text("utf-8"))


@pytest.mark.parametrize(
    "arguments", [["show", ADAPTER], ["verify", ADAPTER], ["diff", ADAPTER, OTHER], ["schema"]]
)
def test_reading_imports_no_torch(arguments):
    """A command that loads no model starts at once."""
    code = (
        "import sys\nfrom peftstate.cli.app import app\n"
        f"app({arguments!r}, standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_verify_a_good_adapter():
    """A line, and exit code 0."""
    result = run("verify", str(GOLDEN / "classifier"))
    assert result.exit_code == 0
    assert result.output.splitlines()[0].split() == ["ok", OTHER]


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
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "peftstate", "verify", "--recursive", str(folders)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # which stands for the end
            while data := os.read(ours, 1000):
                printed += data
    os.close(ours)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", printed.decode()))
    assert any(line.startswith("Verifying ") for line in lines)
    assert [line for line in lines if "good" in line] == [
        f"ok           {folders / 'a' / name}" for name in ("good", "good/ref")
    ]


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
