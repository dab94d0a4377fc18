"""The demo, from training to exit code, on the tiny model."""

from __future__ import annotations

import attrs
import pytest
from rich.console import Console

from peftstate._demo import flow
from peftstate._demo.show import quiet, table
from peftstate._demo.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """What a run of the demo finds: two reloads with plain PEFT, two with peftstate."""
    work = tmp_path_factory.mktemp("demo")
    with quiet():
        checkpoint = tiny_checkpoint(work / "base")
        return flow.run(checkpoint, work / "adapter", 3, lambda _: None)


@pytest.mark.parametrize("column", [2, 3], ids=["given base", "rebuilt base"])
def test_peftstate_gives_back_the_saved_model(comparisons, column):
    """Both reloads with peftstate are the saved model: same logits, same text, same state."""
    found = comparisons[column]

    assert found.logit_difference == 0.0
    assert found.same_text
    assert found.kept == dict.fromkeys(found.kept, True)


def test_plain_peft_does_not(comparisons):
    """Plain PEFT gives another model, even with every advice followed."""
    found = comparisons[0]

    assert found.logit_difference > 0.0
    assert not found.same_text
    kept = {name for name, kept in found.kept.items() if kept}
    # the oldest TRL trains the adapter in fp32, which is what PEFT loads it in
    assert kept - {"adapter_dtype"} == {"quantization", "compute_dtype"}


def test_plain_auto_model_loses_the_quantization(comparisons):
    """The one-line reload of plain PEFT is further off, and keeps next to nothing."""
    assert comparisons[1].logit_difference > comparisons[0].logit_difference
    kept = {name for name, kept in comparisons[1].kept.items() if kept}
    assert kept <= {"adapter_dtype"}  # see above


def test_exit_code_is_0_for_exact_reloads(comparisons):
    """The exit code is 0 for exact reloads with peftstate, whatever plain PEFT does."""
    assert flow.exit_code(comparisons) == 0


@pytest.mark.parametrize(
    "change",
    [{"logit_difference": 1e-7}, {"logit_difference": float("nan")}, {"same_text": False}],
    ids=["logits", "nan", "text"],
)
def test_exit_code_tells_of_an_inexact_reload(comparisons, change):
    """A reload with peftstate that is off in anything makes the demo fail."""
    assert flow.exit_code([*comparisons[:3], attrs.evolve(comparisons[3], **change)]) == 1


def test_exit_code_tells_of_lost_state(comparisons):
    """State that a reload with peftstate lost makes the demo fail, even if the logits agree."""
    lost = attrs.evolve(comparisons[3], kept=comparisons[3].kept | {"random_numbers": False})

    assert flow.exit_code([*comparisons[:3], lost]) == 1


def test_table_shows_what_was_found(comparisons):
    """The printed table has a column for each reload and a row for each measurement."""
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table(comparisons))
    rows = [line.split("│")[1:-1] for line in capture.get().splitlines() if "│" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}

    assert cells["max |Δ logits|"][2:] == ["0.0", "0.0"]
    assert cells["sampled text"] == ["differs", "differs", "same", "same"]
    assert cells["quantization"] == ["kept", "lost", "kept", "kept"]
    assert cells["random numbers"] == ["lost", "lost", "kept", "kept"]
