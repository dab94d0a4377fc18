"""Tests of the section `runtime`."""

from __future__ import annotations

import os

import attrs
import pytest
import torch

from peftstate import PeftModel
from peftstate.errors import RuntimeMismatchError, StateMismatchWarning
from peftstate.sections import _platform, runtime
from peftstate.sections._view import ModelView
from peftstate.sections.runtime import SECTION

VIEW = ModelView(model=torch.nn.Linear(1, 1))


def found(mismatches):
    """Mismatches as they are told."""
    return [str(mismatch) for mismatch in mismatches]


def test_settings_of_the_process_are_recorded():
    """The record has what torch computes with now."""
    torch.set_deterministic_debug_mode("warn")
    torch.set_float32_matmul_precision("high")
    torch.set_default_dtype(torch.bfloat16)
    record = runtime.capture(VIEW)
    assert record.flags["deterministic_algorithms"] == "warn"
    assert record.flags["float32_matmul_precision"] == "high"
    assert record.flags["default_dtype"] == "bfloat16"
    assert record.cpu_threads == torch.get_num_threads()
    assert record.autocast == {}


def test_threads_count_only_where_the_cpu_computes():
    """A model that is elsewhere does not depend on the number of threads."""
    view = ModelView(model=torch.nn.Linear(1, 1, device="meta"))
    assert runtime.capture(view).cpu_threads is None


def test_autocast_is_recorded_where_it_is_on():
    """A state that was saved inside of autocast says so."""
    record = runtime.capture(VIEW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = runtime.capture(VIEW)
    assert inside.autocast == {"cpu": "bfloat16"}
    assert found(SECTION.compare(inside, record)) == [
        "runtime.autocast.cpu: saved 'bfloat16', found absent"
    ]


def test_only_known_variables_are_recorded(monkeypatch):
    """Of the environment nothing is written but what decides about kernels."""
    for name in _platform.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("A_SECRET", "token")
    assert runtime.capture(VIEW).variables == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


def test_flags_that_came_later_are_no_difference():
    """A record of an older torch is compared in the flags that it had."""
    record = runtime.capture(VIEW)
    older = attrs.evolve(record, flags={"default_dtype": "float32"})
    assert SECTION.compare(older, SECTION.capture_like(VIEW, older)) == ()


def test_a_load_warns_of_other_settings_and_sets_none(tmp_path, load_base, with_lora):
    """They belong to the process; the caller can have an error instead, or neither."""
    with_lora(load_base()).eval().save_pretrained(tmp_path)
    torch.set_float32_matmul_precision("high")
    with pytest.warns(StateMismatchWarning, match="saved 'highest', found 'high'"):
        PeftModel.from_pretrained(load_base(), tmp_path)
    assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(RuntimeMismatchError, match=r"peftstate\.reproducible"):
        PeftModel.from_pretrained(load_base(), tmp_path, on_mismatch={"runtime": "error"})
    PeftModel.from_pretrained(load_base(), tmp_path, on_mismatch={"runtime": "ignore"})


def test_applied_sets_the_record_and_puts_the_process_back():
    """In the body flags and threads are the record's, but for those that are given."""
    before = runtime.capture(VIEW)
    saved = attrs.evolve(
        before,
        flags={**before.flags, "default_dtype": "float64", "cudnn.benchmark": True},
        cpu_threads=1,
    )
    with runtime.applied(saved, {"cudnn.benchmark": False}):
        inside = runtime.capture(VIEW)
        assert inside.flags == {**before.flags, "default_dtype": "float64"}
        assert inside.cpu_threads == 1
    assert runtime.capture(VIEW) == before
    with runtime.applied(None, {"cudnn.benchmark": True}):
        assert torch.backends.cudnn.benchmark
    assert runtime.capture(VIEW) == before


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_no_manifest_starts_threads_without_end(threads):
    """A number of threads that this machine has no processors for is passed over."""
    before = torch.get_num_threads()
    record = attrs.evolve(runtime.capture(VIEW), cpu_threads=threads)
    assert threads < 1 or threads > (os.cpu_count() or 1)
    with runtime.applied(record, {}):
        assert torch.get_num_threads() == before
