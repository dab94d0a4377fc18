"""Evaluation inside `reproducible` gives the same each time, and leaves no trace."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig

import peftstate
from peftstate.sections import _flags

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


def process() -> dict[str, Any]:
    """All that belongs to the process."""
    return {
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "flags": _flags._read(),
        "threads": torch.get_num_threads(),
        "variable": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def sample(model: Any) -> list[int]:
    """Ids that are drawn, and a number of each generator."""
    ids = model.generate(
        input_ids=torch.tensor([[4, 5, 6]]), do_sample=True, temperature=2.0, max_new_tokens=12
    )
    return [*ids.flatten().tolist(), random.random(), float(np.random.random())]


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    """Start without a choice of cuBLAS workspaces, and leave none."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


@pytest.fixture
def model(load_base, with_lora):
    """A model with mixed train flags."""
    model = with_lora(load_base()).train()
    model.base_model.model.model.layers[0].eval()
    return model


def flags(model: Any) -> dict[str, bool]:
    """The train flag of each module."""
    return {name: module.training for name, module in model.named_modules()}


def test_each_time_gives_the_same(model, logits):
    """Text that is sampled, and logits of a model that has dropout, are the same each time."""
    results = []
    for _ in range(2):
        torch.rand(3)
        with peftstate.reproducible(model, seed=7):
            results.append((sample(model), logits(model).tolist()))
    assert results[0] == results[1]
    with peftstate.reproducible(model, seed=8):
        assert sample(model) != results[0][0]


def test_the_seed_is_the_one_of_torch(model):
    """What is drawn is what the usual calls would have seeded; any integer of torch's will do."""
    with peftstate.reproducible(model, seed=2**40 + 3):
        inside = torch.rand(2), random.random()
    torch.manual_seed(2**40 + 3)
    random.seed(2**40 + 3)
    assert torch.equal(inside[0], torch.rand(2))
    assert inside[1] == random.random()


def test_nothing_is_left_behind(model):
    """Flags of every module, generators, settings and variables are as before."""
    before, modes = process(), flags(model)
    with peftstate.reproducible(model, seed=7):
        assert not any(flags(model).values())
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
        sample(model)
    assert process() == before
    assert flags(model) == modes


def test_nothing_is_left_behind_by_an_exception(model):
    """The exception comes out, and all is as before."""
    before, modes = process(), flags(model)

    def fail() -> None:
        with peftstate.reproducible(model, seed=7):
            sample(model)
            model.train()
            torch.set_default_dtype(torch.float64)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert process() == before
    assert flags(model) == modes


def test_it_can_be_nested(model):
    """The inner one puts back what the outer one has set, and the outer one goes on."""
    before = process()
    with peftstate.reproducible(model, seed=1):
        expected = sample(model), sample(model)
    with peftstate.reproducible(model, seed=1):
        first = sample(model)
        with peftstate.reproducible(model, seed=2):
            sample(model)
        assert torch.are_deterministic_algorithms_enabled()
        assert not model.training
        second = sample(model)
    assert (first, second) == expected
    assert process() == before


def test_without_a_seed_it_is_the_saved_state(model, load_base, tmp_path):
    """A model that is saved, one that is loaded and one that is restored all draw the same."""
    model.save_pretrained(tmp_path)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, is_trainable=False)
    restored = peft.get_peft_model(
        load_base(), LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    peftstate.restore(restored, tmp_path, on_mismatch={"adapters": "ignore"})
    torch.manual_seed(6)
    for same in (model, loaded, restored, copy.deepcopy(loaded)):
        for _ in range(2):
            with peftstate.reproducible(same):
                assert torch.rand(1) == expected[0]
                assert random.random() == expected[1]


def test_without_a_seed_and_a_saved_state_it_says_so(model):
    """There is nothing to set the generators to; the error says what to pass."""
    before, modes = process(), flags(model)
    with (
        pytest.raises(ValueError, match="pass a seed"),
        peftstate.reproducible(model),
    ):
        pytest.fail("it was entered")
    assert process() == before
    assert flags(model) == modes


def test_the_saved_settings_are_set(model, load_base, tmp_path):
    """Inside, torch computes with what it computed with when the model was saved."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    model.save_pretrained(tmp_path)
    torch.set_float32_matmul_precision("highest")
    loaded = peftstate.PeftModel.from_pretrained(
        load_base(), tmp_path, on_mismatch={"runtime": "ignore"}
    )
    with peftstate.reproducible(loaded):
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cudnn.benchmark  # it chooses by time
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_strict_caller_stays_strict(model):
    """An operation that has no deterministic algorithm warns, or fails for who asked for that."""
    with peftstate.reproducible(model, seed=0):
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_deterministic_debug_mode("error")
    with peftstate.reproducible(model, seed=0):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_deterministic_debug_mode() == 2


def test_a_variable_that_is_set_stays(model, monkeypatch):
    """The caller's own choice of cuBLAS workspaces counts."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with peftstate.reproducible(model, seed=0):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_any_module_will_do():
    """With a seed the model need not be one of PEFT's."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    x = torch.ones(1, 2)
    with peftstate.reproducible(module, seed=0):
        assert torch.equal(module(x), module(x))
    assert module[1].training
