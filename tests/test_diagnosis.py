"""What a diagnosis says, as text, as JSON, in a notebook."""

from __future__ import annotations

import json
import subprocess
import sys

import attrs

from tests._diagnosis import DIAGNOSIS, effect


def test_the_text():
    """A line for each cause, with its figures."""
    assert str(DIAGNOSIS) == (
        "The predictions differ: max |Δ logits| 19.8, KL 0.4, top-1 62.5%.\n"
        "quantization type [quantization]: max |Δ logits| 19.5, KL 0.39, top-1 62.5%; "
        "saved nf4, found fp4\n"
        "adapter dtype [dtype]: max |Δ logits| 0.59, KL 0.012, top-1 100%; "
        "saved bfloat16, found float32\n"
        "attention [implementation]: max |Δ logits| 0, KL 0, top-1 100%; saved eager, found sdpa\n"
        "train mode [training]: max |Δ logits| 1.25, KL 0.025, top-1 99.9%; "
        "saved train, found eval (both modes with the saved random numbers)\n"
        "not measured: random numbers [rng]: saved 1, found 2 "
        "(changes sampled text and dropout: torch_cpu.digest)"
    )


def test_what_no_cause_explains_is_said():
    """A remainder is a line of its own."""
    found = attrs.evolve(DIAGNOSIS, rest=effect(0.5))
    assert "\nnot explained by these: max |Δ logits| 0.5, KL 0.01, top-1 100%\n" in str(found)


def test_for_other_programs():
    """As JSON, with everything in it."""
    found = json.loads(json.dumps(DIAGNOSIS.to_dict()))
    assert found["ok"] is False
    assert found["causes"][0]["effect"]["max_difference"] == 19.5
    assert found["unmeasured"][0]["effect"] is None


def test_in_a_notebook():
    """The causes are rows of a table, and texts are escaped."""
    cause = attrs.evolve(DIAGNOSIS.causes[0], found="<fp4>")
    page = attrs.evolve(DIAGNOSIS, causes=(cause,))._repr_html_()
    assert "<th>quantization type</th><td>quantization</td><td>nf4</td><td>&lt;fp4&gt;</td>" in page
    assert "<th>random numbers</th>" in page


def test_records_need_no_torch():
    """A diagnosis that was stored is read without torch."""
    code = "import sys, peftstate\npeftstate.Diagnosis\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
