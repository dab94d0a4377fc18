"""Tests of `peftstate._progress`: who sees a bar, and when."""

from __future__ import annotations

import contextlib
import io
import threading

import huggingface_hub.utils
import pytest
import transformers

import peftstate
from peftstate import _progress
from peftstate._progress import progress

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        """It is."""
        return True


def written(work, stream=None):
    """What some work writes to standard error, which is a terminal."""
    with contextlib.redirect_stderr(Terminal() if stream is None else stream) as terminal:
        work()
    return terminal.getvalue()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Bars do not wait for a second."""
    monkeypatch.setattr(_progress, "_PATIENCE", 0.0)


@pytest.fixture
def bars_again():
    """Have progress bars allowed again afterwards."""
    yield
    transformers.utils.logging.enable_progress_bar()


def show():
    """Do something with a bar."""
    with progress("Counting", 4, "sheep") as reach:
        reach(3)


def test_a_bar_says_what_is_done_and_how_far_it_is():
    """It counts in its unit, and is gone when all is done."""
    text = written(show)
    assert text.startswith("\rCounting:   0%|")
    assert "0/4 [00:00<?, ? sheep/s]" in text
    assert text.rpartition("\r")[0].endswith(" ")


def test_bytes_have_units():
    """Large numbers of bytes are shown in units of them."""

    def work():
        with progress("Hashing", 3_000_000, "B"):
            pass

    assert "0.00/3.00M" in written(work)


def test_what_is_soon_done_shows_nothing(monkeypatch):
    """Nothing is written before a bar's time has come."""
    monkeypatch.setattr(_progress, "_PATIENCE", 3600.0)
    assert not written(show)


@pytest.mark.parametrize(
    "switch_off",
    [
        transformers.utils.logging.disable_progress_bar,
        huggingface_hub.utils.disable_progress_bars,
    ],
    ids=["transformers", "huggingface_hub"],
)
@pytest.mark.usefixtures("bars_again")
def test_bars_can_be_switched_off(switch_off):
    """Where the bars of transformers or of huggingface_hub are off, so are ours."""
    switch_off()
    assert _progress.are_disabled()
    assert not written(show)


def test_a_file_gets_no_bar():
    """Standard error that is no terminal is left alone."""
    assert not written(show, io.StringIO())


def test_without_standard_error():
    """A program without a console has none."""
    with contextlib.redirect_stderr(None):
        show()


def test_other_threads_show_nothing():
    """One bar at a time: that of the main thread."""

    def work():
        thread = threading.Thread(target=show)
        thread.start()
        thread.join()

    assert not written(work)


def test_a_save_a_load_and_a_verification_show_theirs(load_base, with_lora, tmp_path):
    """Where the base model is digested or compared, and where files are hashed."""
    model, base = with_lora(load_base("bf16")), load_base("bf16")
    assert "\rDigesting the base model" in written(lambda: model.save_pretrained(tmp_path))
    load = peftstate.PeftModel.from_pretrained
    assert "\rComparing the base model" in written(lambda: load(base, tmp_path))
    verify = peftstate.verify_files
    assert "\rHashing adapter_model.safetensors" in written(lambda: verify(tmp_path))
