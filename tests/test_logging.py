"""Tests of the lines that saves and loads log."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest

import peftstate

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")

ALL = (
    "quantization, base_model, dtype, adapters, extra_tensors, training, implementation, "
    "generation, runtime, environment, rng"
)
TENSORS = 29
"""Of the base model of `causal_lm`."""


@pytest.fixture
def logged(caplog):
    """What was logged since the last look: level and text, the time it took as ``0.00``."""
    caplog.set_level(logging.DEBUG, logger="peftstate")

    def look():
        found = [
            (record.levelname, re.sub(r" in \d+\.\d\d s: ", " in 0.00 s: ", record.getMessage()))
            for record in caplog.records
            if record.name == "peftstate"
        ]
        caplog.clear()
        return found

    return look


def test_each_save_and_load_is_a_line(load_base, with_lora, tmp_path, logged):
    """It says what was recorded or restored, and how much of the base model was looked at."""
    with_lora(load_base()).save_pretrained(tmp_path)
    digested = f"; {TENSORS} tensors of the base model digested"
    assert logged() == [("INFO", f'saved "{tmp_path}" in 0.00 s: {ALL}{digested}')]

    model = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    compared = f"; {TENSORS} tensors of the base model compared"
    assert logged() == [("INFO", f'loaded "{tmp_path}" in 0.00 s: {ALL}{compared}')]

    model.load_adapter(tmp_path, "second")
    own = "quantization, base_model, dtype, adapters, extra_tensors"
    assert logged() == [("INFO", f'loaded "{tmp_path}" in 0.00 s: {own}{compared}')]


def test_a_restore_is_a_line(load_base, with_lora, tmp_path, logged):
    """As a load is."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    logged()
    peftstate.restore(model, tmp_path)
    compared = f"; {TENSORS} tensors of the base model compared"
    assert logged() == [("INFO", f'restored "{tmp_path}" in 0.00 s: {ALL}{compared}')]


def test_what_was_ignored_is_not_said_to_be_restored(load_base, with_lora, tmp_path, logged):
    """Nor is the base model said to be compared, or what a load for inference leaves alone."""
    with_lora(load_base()).save_pretrained(tmp_path)
    logged()
    peftstate.PeftModel.from_pretrained(
        load_base(),
        tmp_path,
        is_trainable=False,
        on_mismatch={"base_model": "ignore", "environment": "ignore"},
    )
    left = "quantization, dtype, adapters, extra_tensors, implementation, generation, runtime"
    assert logged() == [("INFO", f'loaded "{tmp_path}" in 0.00 s: {left}')]


def test_a_failed_load_logs_nothing(load_base, with_lora, tmp_path, logged):
    """The error says it all."""
    with_lora(load_base("bf16")).save_pretrained(tmp_path)
    logged()
    with pytest.raises(peftstate.errors.StateMismatchError):
        peftstate.PeftModel.from_pretrained(load_base("nf4"), tmp_path)
    assert not logged()


def test_nothing_is_printed_unless_logging_is_set_up():
    """As a library has it: the logger of the package has a handler that does nothing."""
    code = "import peftstate, logging; logging.getLogger('peftstate').warning('seen by nobody')"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert not result.stderr
