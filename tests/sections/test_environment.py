"""Tests of the section `environment`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import attrs
import pytest
import torch
import transformers

from peftstate import PeftModel
from peftstate._policy import Policy
from peftstate._report import Report
from peftstate.errors import EnvironmentMismatchError, StateMismatchWarning
from peftstate.sections import _platform, environment
from peftstate.sections._view import ModelView
from peftstate.sections.environment import SECTION

VIEW = ModelView(model=torch.nn.Linear(1, 1))


def test_versions_and_devices_are_recorded():
    """What may explain a difference in the last bits is there."""
    record = environment.capture(VIEW)
    assert record.python == platform.python_version()
    assert record.packages["torch"] == importlib.metadata.version("torch")
    assert record.packages["transformers"] == transformers.__version__
    assert record.machine == platform.machine()
    assert record.devices == ("cpu",)
    assert record.processor is not None
    assert record.processor.endswith(torch.backends.cpu.get_cpu_capability())


def test_processor_is_left_out_if_nothing_runs_there():
    """Of a model on an accelerator, the processor decides no bit."""
    model = torch.nn.Linear(1, 1, device="meta")
    assert environment.capture(ModelView(model=model)).processor is None


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    """No version is made up for them."""
    version: Callable[[str], str] = importlib.metadata.version

    def without_accelerate(name: str) -> str:
        if name == "accelerate":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    with_it = environment.capture(VIEW).packages
    monkeypatch.setattr(importlib.metadata, "version", without_accelerate)
    _platform.versions.cache_clear()
    without = environment.capture(VIEW).packages
    _platform.versions.cache_clear()
    assert with_it.keys() - without.keys() == {"accelerate"}


def test_devices_are_those_of_the_model():
    """Tensors on several kinds of device are several kinds."""
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta")])
    assert environment.capture(ModelView(model=model)).devices == ("cpu", "meta")


def test_difference_warns_unless_asked_for_more():
    """Nothing of an environment can be restored, and the last bits often agree all the same."""
    record = environment.capture(VIEW)
    other = attrs.evolve(record, packages={**record.packages, "torch": "0.0.1"})
    report = Report(SECTION.compare(other, record), ("environment",))
    with pytest.warns(StateMismatchWarning, match=r"environment\.packages\.torch: saved '0\.0\.1'"):
        Policy.of(None).apply(report)
    with pytest.raises(EnvironmentMismatchError):
        Policy.of({"environment": "error"}).apply(report)
    Policy.of({"environment": "ignore"}).apply(Report((), ()))


def test_load_elsewhere_warns_and_goes_on(tmp_path, monkeypatch, load_base, with_lora, logits):
    """The model is there, bit for bit, and the warning names what differs."""
    model = with_lora(load_base("fp32")).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    with pytest.warns(StateMismatchWarning, match="found '3.99.0'"):
        loaded = PeftModel.from_pretrained(load_base("fp32"), tmp_path)
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(EnvironmentMismatchError):
        PeftModel.from_pretrained(load_base("fp32"), tmp_path, on_mismatch={"environment": "error"})
    PeftModel.from_pretrained(load_base("fp32"), tmp_path, on_mismatch={"environment": "ignore"})
