"""Tests of the section `rng`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from peftstate import PeftModel
from peftstate.errors import BaseModelMismatchError, SaveError
from peftstate.sections import rng
from peftstate.sections._tensors import SidecarTensor, sidecar_tensors, with_tensors
from peftstate.sections._view import ModelView
from peftstate.sections.rng import SECTION, RngRecord

VIEW = ModelView(model=torch.nn.Identity())


def capture() -> RngRecord:
    """The record of the process, through JSON and back, with the tensors of its sidecar."""
    record = rng.capture(VIEW)
    read = SECTION.decode(json.loads(json.dumps(SECTION.encode(record))))
    tensors = {tensor.tensor: tensor.load().clone() for tensor in sidecar_tensors(record)}
    filled: RngRecord = with_tensors(read, tensors)
    return filled


def differences(record: RngRecord) -> list[str]:
    """The fields in which the process differs from a record."""
    return [mismatch.field for mismatch in SECTION.compare(record, capture())]


def numbers() -> list[float]:
    """Random numbers of each generator, normal ones among them."""
    drawn = [random.random(), random.gauss(0, 1), random.randrange(10**30)]
    drawn += [float(np.random.rand()), float(np.random.randn()), int(np.random.randint(10**6))]
    drawn += [torch.rand(()).item(), *torch.randn(3).tolist(), torch.randint(10**6, ()).item()]
    return drawn


def test_random_numbers_go_on_as_they_would_have():
    """Each generator gives the numbers it would have given."""
    numbers()
    record = capture()
    expected = [numbers() for _ in range(3)]
    rng.restore(record, VIEW)
    assert [numbers() for _ in range(3)] == expected


def test_normal_numbers_in_hand_are_kept():
    """Both `random.gauss` and numpy make two normal numbers at once and keep one."""
    random.gauss(0, 1)
    np.random.randn()
    record = capture()
    assert record.python.gauss is not None
    assert record.numpy.gauss is not None
    expected = random.gauss(0, 1), np.random.randn()
    random.seed(9)
    np.random.seed(9)
    rng.restore(record, VIEW)
    assert (random.gauss(0, 1), np.random.randn()) == expected


def test_no_normal_number_in_hand_is_restored():
    """One that is in hand now is given up if there was none."""
    record = capture()
    assert record.python.gauss is None
    assert record.numpy.gauss is None
    expected = random.gauss(0, 1), np.random.randn()
    rng.restore(record, VIEW)
    random.gauss(0, 1)
    np.random.randn()
    rng.restore(record, VIEW)
    assert (random.gauss(0, 1), np.random.randn()) == expected


def test_capture_draws_nothing_and_is_a_copy():
    """The states of a record stand still while the generators go on."""
    record = rng.capture(VIEW)
    assert differences(record) == []
    numbers()
    assert len(differences(record)) >= 3
    rng.restore(record, VIEW)
    assert differences(record) == []


@pytest.mark.parametrize(
    ("draw", "changed"),
    [
        (random.random, {"python.state.digest"}),
        (lambda: random.gauss(0, 1), {"python.state.digest", "python.gauss"}),
        (lambda: np.random.rand(400), {"numpy.position", "numpy.state.digest"}),
        (lambda: torch.rand(1), {"torch_cpu.digest"}),
    ],
    ids=["python", "gauss", "numpy", "torch"],
)
def test_each_generator_is_compared(draw, changed):
    """A number that was drawn shows at the generator it came from."""
    record = capture()
    draw()
    assert set(differences(record)) == changed


def broken(record: RngRecord, name: str) -> RngRecord:
    """A record in which the state of one generator is none."""

    def changed(state: SidecarTensor) -> SidecarTensor:
        return SidecarTensor.of(state.tensor, state.load()[:-1])

    if name == "torch":
        return attrs.evolve(record, torch_cpu=changed(record.torch_cpu))
    if name == "position":
        return attrs.evolve(record, numpy=attrs.evolve(record.numpy, position=700))
    part: Any = getattr(record, name)
    return attrs.evolve(record, **{name: attrs.evolve(part, state=changed(part.state))})


@pytest.mark.parametrize("name", ["python", "numpy", "position", "torch"])
def test_all_generators_are_set_or_none(name):
    """If one state is not what its generator takes, the others are as they were."""
    record = broken(capture(), name)
    numbers()
    before = capture()
    with pytest.raises((ValueError, RuntimeError)):
        rng.restore(record, VIEW)
    assert differences(before) == []


def test_record_without_its_sidecar_cannot_be_restored():
    """A manifest that was read alone has no states."""
    record = SECTION.decode(SECTION.encode(rng.capture(VIEW)))
    before = capture()
    with pytest.raises(ValueError, match="sidecar was not loaded"):
        rng.restore(record, VIEW)
    assert differences(before) == []


KINDS = ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]


@pytest.fixture
def numpy_generator():
    """Sets numpy's global generator: `numpy_generator(one)`; afterwards it is the old one."""
    before = np.random.get_bit_generator()
    yield np.random.set_bit_generator
    np.random.set_bit_generator(before)


class Elsewhere(np.random.PCG64):
    """A generator of another package."""


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_numpys_generator_comes_back(kind, before, numpy_generator):
    """Whatever kind the process has when it is restored; a number half used goes on, too."""
    numpy_generator(getattr(np.random, kind)(7))
    np.random.randint(9, dtype=np.uint32)
    np.random.randn()
    record = capture()
    assert record.numpy.generator == kind
    expected = numbers(), np.random.randint(2**31, size=5, dtype=np.uint32).tolist()
    numpy_generator(getattr(np.random, before)(8))
    rng.restore(record, VIEW)
    assert differences(record) == []
    assert (numbers(), np.random.randint(2**31, size=5, dtype=np.uint32).tolist()) == expected


def test_a_generator_that_is_not_numpys_is_refused(numpy_generator):
    """Its state would not fit the manifest; a save that left it out would be a lie."""
    numpy_generator(Elsewhere(1))
    with pytest.raises(ValueError, match="numpy's global generator is a Elsewhere"):
        rng.capture(VIEW)


@pytest.mark.parametrize("kind", ["Elsewhere", "Generator", "__class__", ""])
def test_no_other_kind_can_be_set(kind):
    """A manifest can name numpy's own."""
    record = capture()
    record = attrs.evolve(record, numpy=attrs.evolve(record.numpy, generator=kind))
    before = capture()
    with pytest.raises(ValueError, match="of which the state cannot be saved"):
        rng.restore(record, VIEW)
    assert differences(before) == []


@pytest.mark.parametrize("cls", [np.random.PCG64, Elsewhere])
@pytest.mark.parametrize("is_trainable", [None, False])
def test_a_load_leaves_any_generator_that_it_is_not_to_restore(  # noqa: PLR0917
    cls, is_trainable, numpy_generator, load_base, with_lora, tmp_path
):
    """Also one whose state cannot be saved, and also if the load fails."""
    with_lora(load_base()).eval().save_pretrained(tmp_path)
    ours = cls(3)
    numpy_generator(ours)
    policy = {"rng": "ignore"} if is_trainable is None else None
    before = np.random.get_state(legacy=False)
    base = load_base()
    base.model.norm.weight.data += 1
    with pytest.raises(BaseModelMismatchError):
        PeftModel.from_pretrained(base, tmp_path, on_mismatch=policy, is_trainable=is_trainable)
    PeftModel.from_pretrained(load_base(), tmp_path, on_mismatch=policy, is_trainable=is_trainable)
    assert np.random.get_bit_generator() is ours
    assert np.random.get_state(legacy=False) == before


def test_a_generator_that_cannot_be_saved_loses_no_training(
    numpy_generator, load_base, with_lora, tmp_path
):
    """The error says what to do and where the adapter lies meanwhile."""
    numpy_generator(Elsewhere(1))
    model = with_lora(load_base())
    with pytest.raises(SaveError, match="numpy's global generator is a Elsewhere") as caught:
        model.save_pretrained(tmp_path / "adapter")
    assert (Path(caught.value.rescued) / "adapter_model.safetensors").exists()


def test_a_probe_runs_under_any_generator(numpy_generator, load_base, with_lora, tmp_path):
    """Its forward pass is seeded, which numpy's other kinds do not take."""
    ours = np.random.PCG64(3)
    numpy_generator(ours)
    model = with_lora(load_base()).eval()
    model.save_pretrained(tmp_path, prediction_probe=True)
    PeftModel.from_pretrained(load_base(), tmp_path)
    assert np.random.get_bit_generator() is ours


@attrs.define
class Device:
    """An accelerator that this machine does not have."""

    state: torch.Tensor

    def backend(self) -> Any:
        """torch's module for it."""

        def set_state(state: torch.Tensor, _index: int) -> None:
            if state.numel() != self.state.numel():
                raise RuntimeError("RNG state is wrong size")
            self.state = state.clone()

        return SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 1,
            get_rng_state=lambda _index: self.state.clone(),
            set_rng_state=set_state,
        )


@pytest.fixture
def device(monkeypatch):
    """One CUDA device, and no other."""
    device = Device(torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch, "cuda", device.backend())
    for kind in ("xpu", "mps", "npu"):
        monkeypatch.setattr(torch, kind, None, raising=False)
    return device


def test_generators_of_accelerators_are_restored(device):
    """Each device has a generator of its own."""
    record = capture()
    assert list(record.accelerators) == ["cuda:0"]
    device.state = torch.zeros(16, dtype=torch.uint8)
    assert differences(record) == ["accelerators[cuda:0].digest"]
    rng.restore(record, VIEW)
    assert differences(record) == []
    assert torch.equal(device.state, torch.arange(16, dtype=torch.uint8))


@pytest.mark.usefixtures("device")
def test_broken_state_of_an_accelerator_leaves_all_as_it_was():
    """The device comes last, when the others are set already."""
    record = capture()
    state = SidecarTensor.of("rng.cuda:0", torch.zeros(3, dtype=torch.uint8))
    record = attrs.evolve(record, accelerators={"cuda:0": state})
    numbers()
    before = capture()
    with pytest.raises(RuntimeError, match="wrong size"):
        rng.restore(record, VIEW)
    assert differences(before) == []


@pytest.mark.usefixtures("device")
def test_generator_of_a_device_that_is_not_here_is_a_difference(monkeypatch):
    """What this machine has is restored, and the rest is said."""
    record = capture()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    expected = numbers()
    rng.restore(record, VIEW)
    assert differences(record) == ["accelerators[cuda:0]"]
    assert numbers() == expected


def test_loading_an_adapter_draws_numbers_that_restoring_takes_back(load_base, with_lora):
    """This is why the generators come last."""
    record = capture()
    with_lora(load_base("fp32"))
    assert differences(record)
    rng.restore(record, VIEW)
    assert differences(record) == []
