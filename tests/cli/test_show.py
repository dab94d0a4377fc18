"""``peftstate show``, ``diff`` and ``schema``: reading, without torch."""

from __future__ import annotations

import json
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
