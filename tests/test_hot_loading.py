"""Adapters that come and go on one base model, as in a server: hundreds, each verified."""

from __future__ import annotations

import gc
import shutil
import weakref

import peft
import pytest
import torch

import peftstate
from peftstate import errors

KINDS = 10
"""Adapters that differ; each is loaded under several names."""
TINY = {"r": 1, "target_modules": ["q_proj"], "layers_to_transform": [1]}
NAMES = [f"adapter{number}" for number in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, load_base, with_lora):
    """Adapters for one base model, and some that must be refused."""
    folder = tmp_path_factory.mktemp("hot-loading")
    for number in range(KINDS):
        torch.manual_seed(number)
        with_lora(load_base("bf16"), **TINY).save_pretrained(folder / str(number))
    other = load_base("bf16")
    other.lm_head.weight.data += 1
    with_lora(other, **TINY).save_pretrained(folder / "another base")
    with_lora(load_base("nf4"), **TINY).save_pretrained(folder / "another quantization")
    shutil.copytree(folder / "0", folder / "damaged")
    weights = folder / "damaged" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    shutil.copytree(folder / "0", folder / "no manifest")
    (folder / "no manifest" / "peftstate.json").unlink()
    return folder


WRONG = {
    "another base": errors.BaseModelMismatchError,
    "another quantization": errors.QuantizationMismatchError,
    "damaged": errors.IntegrityError,
    "no manifest": errors.ManifestNotFoundError,
}


@pytest.fixture
def model(folder, load_base):
    """A model that serves the first adapter."""
    return peftstate.PeftModel.from_pretrained(load_base("bf16"), folder / "0", is_trainable=False)


def state_of(model):
    """All that a model is, as JSON, its modules and hooks, and what we keep on it."""
    hooks = {
        name: [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
        for name, module in model.named_modules()
    }
    kept = {
        key: len(value)
        for key, value in vars(model).items()
        if key.startswith("_peftstate") and hasattr(value, "__len__")
    }
    return peftstate.capture(model).to_json(), hooks, kept, sorted(vars(model))


def tensors_of(model, name):
    """The tensors of an adapter, as references that do not keep them."""
    return [
        weakref.ref(parameter)
        for key, parameter in model.named_parameters()
        if f".{name}." in f"{key}."
    ]


def test_hundreds_come_and_go(folder, model, logits):
    """Each gives its own logits; wrong ones disturb none; afterwards the model is what it was."""
    model.set_adapter("default")  # by which PEFT makes it trainable
    before = state_of(model)
    expected = [logits(model)]
    for number in range(1, KINDS):
        model.load_adapter(folder / str(number), "probe")
        model.set_adapter("probe")
        expected.append(logits(model))
        model.set_adapter("default")
        model.delete_adapter("probe")
    wrong = list(WRONG.items())

    for number, name in enumerate(NAMES):
        model.load_adapter(folder / str(number % KINDS), name, require_manifest=True)
        if number % 20 == 10:
            kind, error = wrong[number // 20 % len(wrong)]
            with pytest.raises(error):
                model.load_adapter(folder / kind, "wrong", require_manifest=True)
            with pytest.raises(error):
                model.load_adapter(folder / kind, name, require_manifest=True)
    assert list(model.peft_config) == ["default", *NAMES]
    for number in range(0, len(NAMES), 9):
        model.set_adapter(NAMES[number])
        assert torch.equal(logits(model), expected[number % KINDS]), number
    model.set_adapter("default")

    loaded = [tensor for name in NAMES for tensor in tensors_of(model, name)]
    assert len(loaded) == len(NAMES) * len(tensors_of(model, "default"))
    for name in NAMES:
        model.delete_adapter(name)
    gc.collect()
    assert [tensor() for tensor in loaded if tensor() is not None] == []
    assert state_of(model) == before
    assert torch.equal(logits(model), expected[0])


def test_one_name_again_and_again(folder, model, logits):
    """An adapter that is replaced leaves nothing behind, nor does one that is refused."""
    model.load_adapter(folder / "1", "more")
    model.set_adapter("more")
    before, expected = state_of(model), logits(model)
    for number in range(2, 42):
        if number % 5 == 0:
            with pytest.raises(errors.IntegrityError):
                model.load_adapter(folder / "damaged", "more")
        model.load_adapter(folder / str(number % KINDS), "more")
    assert torch.equal(logits(model), expected)
    assert state_of(model) == before


def test_lora_beside_a_prompt(folder, load_base):
    """What cannot be combined is refused in the words of PEFT."""
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peftstate.get_peft_model(load_base("bf16"), prompt)
    with pytest.raises(errors.AdapterLoadError, match="Cannot combine adapters with different"):
        model.load_adapter(folder / "0", "further")


def test_how_a_tuner_makes_layers_is_left_alone(folder, model):
    """Also where somebody has changed it, on the model itself."""
    tuner, made = model.base_model, []
    create = tuner._create_and_replace

    def creating(*args, **kwargs):
        made.append(args)
        create(*args, **kwargs)

    model.load_adapter(folder / "0", "one")
    assert "_create_and_replace" not in vars(tuner)
    tuner._create_and_replace = creating
    for name in ("two", "three"):
        made.clear()
        model.load_adapter(folder / "0", name)
        assert made
    assert vars(tuner)["_create_and_replace"] is creating
