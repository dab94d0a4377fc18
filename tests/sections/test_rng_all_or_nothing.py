"""Restoring the random generators is all or nothing, whichever setter fails and however."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch

import peftstate
from benchmarks._faults.scene import generators, seed_all
from peftstate import errors
from peftstate.sections import rng
from peftstate.sections._generators import devices
from peftstate.sections._view import ModelView
from tests.sections.test_rng import Device

VIEW = ModelView(model=torch.nn.Identity())

SETTERS: dict[str, tuple[Any, str]] = {
    "python": (random, "setstate"),
    "numpy": (np.random, "set_state"),
    "torch": (torch, "set_rng_state"),
}


class BrokenError(Exception):
    """What no library raises."""


@attrs.define
class Fails:
    """A setter that fails.

    Attributes:
        setter: The one that it stands for.
        first: Whether it fails before it sets anything, or after it did.
        times: How often it fails before it works again.
    """

    setter: Callable[..., None]
    first: bool
    times: int = 1

    def __call__(self, *arguments: Any) -> None:
        """Set, or not, and fail."""
        fails, self.times = self.times > 0, self.times - 1
        if not (fails and self.first):
            self.setter(*arguments)
        if fails:
            raise BrokenError


@pytest.fixture(params=["first", "afterwards", "for ever"])
def break_setter(request, monkeypatch):
    """Has a setter fail once before or after it sets the state, or always."""

    def apply(owner: Any, name: str) -> None:
        first, times = request.param != "afterwards", 10**9 if request.param == "for ever" else 1
        setter = Fails(getattr(owner, name), first=first, times=times)
        monkeypatch.setattr(owner, name, setter)

    return apply


@pytest.mark.parametrize("name", SETTERS)
def test_a_setter_fails(name, break_setter):
    """All generators are as before, the failing one too."""
    record = rng.capture(VIEW)
    seed_all(5)
    before = generators()
    break_setter(*SETTERS[name])
    with pytest.raises((BrokenError, errors.RestoreError)):
        rng.restore(record, VIEW)
    assert generators() == before


@pytest.mark.parametrize("failing", [0, 1])
def test_the_setter_of_a_device_fails(failing, break_setter, monkeypatch):
    """The devices that were set before it are put back, too."""
    states = [Device(torch.arange(16, dtype=torch.uint8)), Device(torch.ones(16).byte())]
    backends = [device.backend() for device in states]
    both = {f"cuda:{index}": (backend, 0) for index, backend in enumerate(backends)}
    for module in ("rng", "_generators"):
        monkeypatch.setattr(f"peftstate.sections.{module}.devices", lambda: both)
    assert devices is not rng.devices
    record = rng.capture(VIEW)
    for device in states:
        device.state = torch.zeros(16, dtype=torch.uint8)
    seed_all(5)
    before = generators()
    break_setter(backends[failing], "set_rng_state")
    with pytest.raises((BrokenError, errors.RestoreError)):
        rng.restore(record, VIEW)
    assert generators() == before
    assert not any(device.state.any() for device in states)


@pytest.mark.parametrize("name", SETTERS)
def test_a_setter_fails_in_a_load(name, break_setter, load_base, with_lora, tmp_path):
    """The load raises `RestoreError`, and the process goes on with its own random numbers."""
    with_lora(load_base()).eval().save_pretrained(tmp_path)
    base = load_base()
    seed_all(5)
    before = generators()
    break_setter(*SETTERS[name])
    with pytest.raises(errors.RestoreError) as caught:
        peftstate.PeftModel.from_pretrained(base, tmp_path)
    found = generators()
    if "could not be put back" in str(caught.value):  # it can only be the one that is broken
        broken = {"python": [0], "numpy": [1, 2], "torch": [3]}[name]
        found = tuple(before[i] if i in broken else state for i, state in enumerate(found))
    assert found == before


def test_a_load_fails_after_the_generators_were_set(load_base, with_lora, tmp_path, monkeypatch):
    """What comes after them, the predictions, takes them back if it does not hold."""
    model = with_lora(load_base()).eval()
    model.save_pretrained(tmp_path, prediction_probe=True)
    base = load_base()
    base.model.layers[0].register_forward_hook(lambda *arguments: arguments[-1] * 2)
    seed_all(5)
    before = generators()
    was_set = []
    setter = torch.set_rng_state
    monkeypatch.setattr(
        torch, "set_rng_state", lambda state: (was_set.append(state), setter(state))
    )
    with pytest.raises(errors.PredictionMismatchError):
        peftstate.PeftModel.from_pretrained(base, tmp_path)
    assert any(not torch.equal(state, torch.tensor(before[-1]).byte()) for state in was_set)
    assert generators() == before
