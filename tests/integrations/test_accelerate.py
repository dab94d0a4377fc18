"""accelerate's `save_state` and `load_state` in one process; `test_distributed` has two."""

from __future__ import annotations

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration
from peft import LoraConfig

import peftstate
from peftstate import errors
from peftstate.integrations.accelerate import register

IDS = torch.arange(4, 16).reshape(2, 6)


@pytest.fixture
def accelerator():
    """An accelerator on the CPU; what it holds for the whole process is cleared."""
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def adapted(load_base):
    """Makes a model with an adapter, as code does that never heard of peftstate."""

    def make(kind="fp32"):
        config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3)
        return peft.get_peft_model(load_base(kind), config).train()

    return make


def prepared(accelerator, model):
    """The model and an optimizer, prepared, and a function that trains one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step():
        accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def state(model):
    """The adapter's tensors, as they are now."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_training_goes_on_as_it_would_have(accelerator, adapted, tmp_path, kind):
    """After `load_state` the steps are those that followed `save_state`, bit for bit."""
    model, step = prepared(accelerator, adapted(kind))
    register(accelerator)
    assert type(model) is peftstate.PeftModelForCausalLM
    step()
    accelerator.save_state(tmp_path)
    step()
    expected, drawn = state(model), torch.rand(()).item()
    step()
    model.eval()
    accelerator.load_state(tmp_path)
    assert model.training
    step()
    found = state(model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.rand(()).item() == drawn


def test_what_is_in_the_folder(accelerator, adapted, load_base, tmp_path):
    """An adapter folder like any other is in the place of the base model's weights."""
    model, step = prepared(accelerator, adapted())
    register(accelerator)
    step()
    accelerator.save_state(tmp_path)
    assert peftstate.verify_files(tmp_path / "adapter").ok
    assert not list(tmp_path.glob("model*"))
    loaded = peftstate.PeftModel.from_pretrained(
        load_base(), tmp_path / "adapter", is_trainable=False
    )
    with torch.no_grad():
        logits = [each.eval()(input_ids=IDS).logits for each in (loaded, model)]
    assert torch.equal(*logits)


def test_a_new_process_loads_it(accelerator, adapted, tmp_path):
    """A model that was prepared anew comes back as the one that was saved."""
    model, step = prepared(accelerator, adapted())
    register(accelerator)
    step()
    accelerator.save_state(tmp_path)
    expected = state(model)
    accelerator.free_memory()
    fresh, _ = prepared(accelerator, adapted())
    accelerator.load_state(tmp_path)
    assert all(torch.equal(expected[name], found) for name, found in state(fresh).items())


def test_a_damaged_state_is_refused(accelerator, adapted, tmp_path):
    """It is a typed error, and the model stays as it was."""
    model, step = prepared(accelerator, adapted())
    register(accelerator)
    accelerator.save_state(tmp_path)
    step()
    before = state(model)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(errors.IntegrityError):
        accelerator.load_state(tmp_path)
    assert all(torch.equal(before[name], found) for name, found in state(model).items())


def test_another_base_is_refused(accelerator, adapted, load_base, tmp_path):
    """So is a base model that is not the saved one, unless it was asked to be ignored."""
    model, _ = prepared(accelerator, adapted())
    register(accelerator)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.mul_(2)
    with pytest.raises(errors.BaseModelMismatchError):
        accelerator.load_state(tmp_path)


def test_several_models(accelerator, adapted, tmp_path):
    """PEFT models have a folder each; any other model is saved and loaded by accelerate."""
    plain = torch.nn.Linear(3, 3)
    models = [adapted(), plain, adapted()]
    first, plain, second = accelerator.prepare(*models)
    register(accelerator)
    with torch.no_grad():
        for model in (first, second):
            for name, tensor in model.named_parameters():
                if "lora_B" in name:
                    tensor.normal_()
    expected = [state(first), plain.weight.detach().clone(), state(second)]
    accelerator.save_state(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[am]*")) == [
        "adapter",
        "adapter_1",
        "model.safetensors",
    ]
    with torch.no_grad():
        for parameter in (*first.parameters(), *plain.parameters(), *second.parameters()):
            if parameter.requires_grad:
                parameter.zero_()
    accelerator.load_state(tmp_path)
    assert torch.equal(plain.weight, expected[1])
    for model, saved in ((first, expected[0]), (second, expected[2])):
        assert all(torch.equal(saved[name], found) for name, found in state(model).items())


def test_a_state_of_plain_accelerate(accelerator, adapted, tmp_path):
    """What was saved before `register` is loaded as accelerate loads it, with a warning."""
    model, step = prepared(accelerator, adapted())
    accelerator.save_state(tmp_path)
    expected = state(model)
    step()
    register(accelerator)
    with pytest.warns(errors.MissingManifestWarning, match="accelerate loads this model by itself"):
        accelerator.load_state(tmp_path)
    assert all(torch.equal(expected[name], found) for name, found in state(model).items())


def test_registering_again_does_nothing(accelerator, adapted, tmp_path):
    """There is one pair of hooks, and wrong actions are refused at once."""
    prepared(accelerator, adapted())
    with pytest.raises(ValueError, match="'loud' is none of"):
        register(accelerator, on_mismatch="loud")
    register(accelerator)
    register(accelerator)
    assert len(accelerator._save_model_state_pre_hook) == 1
    assert len(accelerator._load_model_state_pre_hook) == 1
    accelerator.save_state(tmp_path)
    accelerator.load_state(tmp_path)


def test_models_that_accelerate_shards_are_left_to_it(accelerator, adapted, monkeypatch, tmp_path):
    """There it has saved before the hook, in pieces; a warning says that our state is not there."""
    model, _ = prepared(accelerator, adapted())
    register(accelerator)
    hook = next(iter(accelerator._save_model_state_pre_hook.values()))
    monkeypatch.setattr(AcceleratorState, "distributed_type", DistributedType.FSDP, raising=False)
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType.FSDP)
    with pytest.warns(errors.UnverifiedWarning, match="accelerate saves the models by itself"):
        hook([model], [], str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_numbered_states(adapted, tmp_path):
    """accelerate's own naming of checkpoints is followed."""
    configuration = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=configuration)
    model, step = prepared(accelerator, adapted())
    register(accelerator)
    accelerator.save_state()
    step()
    expected = state(model)
    accelerator.save_state()
    step()
    accelerator.load_state()
    assert all(torch.equal(expected[name], found) for name, found in state(model).items())
    assert (tmp_path / "checkpoints" / "checkpoint_1" / "adapter" / "peftstate.json").exists()
