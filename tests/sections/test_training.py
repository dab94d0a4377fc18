"""Tests of the section `training`."""

from __future__ import annotations

import json
from typing import Any

import attrs
import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from trl.trainer.utils import disable_dropout_in_model

from peftstate._modules import is_container
from peftstate.sections import training
from peftstate.sections._table import Table
from peftstate.sections._view import ModelView
from peftstate.sections.training import SECTION, TrainingRecord


def capture(model: nn.Module) -> TrainingRecord:
    """The record of a model, through JSON and back."""
    record = training.capture(ModelView.of(model))
    return SECTION.decode(json.loads(json.dumps(SECTION.encode(record))))


def restore(record: TrainingRecord, model: nn.Module) -> list[str]:
    """Restore a record, and report what still differs."""
    training.restore(record, ModelView.of(model))
    return [str(mismatch) for mismatch in SECTION.compare(record, capture(model))]


def train_flags(model: nn.Module) -> dict[str, bool]:
    """The train flag of every module; empty containers run nothing."""
    return {
        name: module.training
        for name, module in model.named_modules()
        if len(module._modules) or not is_container(module)
    }


def trainable(model: nn.Module) -> set[str]:
    """The names of the trainable parameters."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def models(load_base, with_lora):
    """Two equal models; that of the first one's base is in eval mode, its adapter in train mode."""
    return with_lora(load_base("fp32")), with_lora(load_base("fp32"))


# Dropout


def probabilities(model: nn.Module) -> list[float]:
    """Of all dropout layers."""
    return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


def test_dropout_that_a_trainer_switched_off(models):
    """TRL does so for DPO, KTO and rewards; the adapter's config says otherwise."""
    model, other = models
    disable_dropout_in_model(model)
    assert set(probabilities(model)) == {0}
    assert set(probabilities(other)) == {0.1}
    assert restore(capture(model), other) == []
    assert probabilities(other) == probabilities(model)


def test_dropout_of_one_layer():
    """Of the base model, too, where the layer's own value is none of the config's."""
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    lora = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    model, other = (peft.get_peft_model(GPT2LMHeadModel(config), lora) for _ in range(2))
    model.base_model.model.transformer.drop.p = 0.5
    record = capture(model)
    assert record.base.dropout == Table(default=0.1, exceptions={"transformer.drop": 0.5})
    assert restore(record, other) == []
    assert probabilities(other) == probabilities(model)


def test_dropout_that_makes_no_sense_is_not_set(models):
    """A manifest is a stranger's word."""
    model, other = models
    record = capture(model)
    part = attrs.evolve(record.adapters["default"], dropout=Table.of({"x": 2.0}))
    assert restore(attrs.evolve(record, adapters={"default": part}), other)
    assert set(probabilities(other)) == {0.1}


def test_dropout_of_which_nothing_is_known(models):
    """What older releases saved says nothing of it, so that it is no difference."""
    model, other = models
    record = capture(model)
    part = attrs.evolve(record.adapters["default"], dropout=Table.of({}))
    older = attrs.evolve(record, adapters={"default": part})
    disable_dropout_in_model(other)
    assert SECTION.compare(older, SECTION.capture_like(ModelView.of(other), older)) == ()
    assert SECTION.compare(record, SECTION.capture_like(ModelView.of(other), record))


# Train flags


def test_mixed_flags_are_restored(models, logits):
    """`get_peft_model` on an eval base leaves dropout of the adapter on, and the base in eval."""
    model, other = models
    record = capture(model)
    assert record.base.train == Table(default=False, exceptions={})
    assert record.adapters["default"].train.default is True
    assert record.in_train_mode
    other.eval()
    assert restore(record, other) == []
    assert train_flags(other) == train_flags(model)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    expected = logits(model)
    torch.manual_seed(3)
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_mode_is_restored(mode, models):
    """A model in one mode is brought back to the other, containers included."""
    model, other = models
    model.train(mode)
    other.train(not mode)
    record = capture(model)
    assert record.in_train_mode is mode
    assert restore(record, other) == []
    assert train_flags(other) == train_flags(model)


def test_single_module_in_another_mode_is_restored(models):
    """BatchNorm is often kept in eval mode while the rest trains."""
    model, other = models
    model.train()
    model.base_model.model.model.layers[1].mlp.eval()
    record = capture(model)
    assert record.base.train.default is True
    assert record.base.train.exceptions.keys() == {
        "model.layers.1.mlp",
        "model.layers.1.mlp.act_fn",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert restore(record, other) == []
    assert train_flags(other) == train_flags(model)


def test_flags_of_a_model_with_an_adapter_under_another_name(models, load_base):
    """An adapter that got another name gets its flags all the same."""
    model, _ = models
    record = capture(model.train())
    other = peft.get_peft_model(
        load_base("fp32"), model.peft_config["default"], adapter_name="renamed"
    ).eval()
    view = ModelView(model=other, adapters={"default": "renamed"}, folders={"default": "."})
    training.restore(record, view)
    assert all(train_flags(other).values())
    assert SECTION.compare(record, training.capture(view)) == ()


def test_adapter_that_is_not_looked_at_is_left_alone(models):
    """The flags of one adapter are not those of another one on the same layers."""
    model, _ = models
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, r=2))
    model.train()
    record = capture(model).for_adapters(["second"])
    assert record.adapters.keys() == {"second"}
    model.eval()
    view = ModelView.of(model).limited_to(["second"])
    training.restore(record, view)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["second"].training
    assert not layer.lora_dropout["default"].training


# Trainable parameters


def test_trainable_set_is_restored(models):
    """Which parameters train is put back one by one, in the base model, too."""
    model, other = models
    model.base_model.model.model.norm.requires_grad_(requires_grad=True)
    frozen = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    dict(model.named_parameters())[frozen].requires_grad_(requires_grad=False)
    record = capture(model)
    assert record.base.requires_grad.exceptions == {"model.norm.weight": True}
    assert record.trains_adapter
    other.requires_grad_(requires_grad=False)
    assert restore(record, other) == []
    assert trainable(other) == trainable(model)
    assert frozen not in trainable(other)


def test_frozen_model_is_restored(models):
    """PEFT's load for training unfreezes the adapter; one that was frozen comes back frozen."""
    model, other = models
    model.requires_grad_(requires_grad=False)
    record = capture(model)
    assert not record.trains_adapter
    assert restore(record, other) == []
    assert trainable(other) == set()


def test_quantized_weights_cannot_train(load_base, with_lora):
    """A manifest that wants gradients of integers is a difference, and no crash."""
    model = with_lora(load_base("int8"))
    record = capture(model)
    base = attrs.evolve(record.base, requires_grad=Table(default=True, exceptions={}))
    differences = restore(attrs.evolve(record, base=base), model)
    assert differences
    assert all("requires_grad" in difference for difference in differences)


# Gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False, None])
def test_gradient_checkpointing_is_restored(use_reentrant, models):
    """It is switched on with the implementation that it had, and changes the gradients' path."""
    model, other = models
    arguments = {} if use_reentrant is None else {"use_reentrant": use_reentrant}
    enable(model, arguments)
    record = capture(model)
    assert record.gradient_checkpointing == ("model", "model.layers.0", "model.layers.1")
    default = training.capture(ModelView.of(model)).use_reentrant
    assert use_reentrant is None or default is use_reentrant
    assert restore(record, other) == []
    functions = [
        [
            getattr(layer._gradient_checkpointing_func, "keywords", None)
            for layer in found.get_base_model().model.layers
        ]
        for found in (model, other)
    ]
    assert functions[0] == functions[1]


def test_gradient_checkpointing_is_switched_off(models):
    """PEFT's `prepare_model_for_kbit_training` on the fresh base is undone."""
    model, other = models
    enable(other, {})
    record = capture(model)
    assert record.gradient_checkpointing == ()
    assert restore(record, other) == []
    assert not any(getattr(layer, "gradient_checkpointing", 0) for layer in other.modules())


def test_checkpointing_of_a_single_layer_is_restored(models):
    """A user may have switched it off on some layers."""
    model, other = models
    enable(model, {"use_reentrant": False})
    model.get_base_model().model.layers[0].gradient_checkpointing = False
    record = capture(model)
    assert record.gradient_checkpointing == ("model", "model.layers.1")
    assert restore(record, other) == []


def test_checkpointed_model_trains_as_before(models):
    """The restored model gives the same gradients."""
    model, other = models
    other.load_state_dict(model.state_dict())
    enable(model, {"use_reentrant": False})
    model.train()
    assert restore(capture(model), other) == []
    assert torch.equal(gradient(model), gradient(other))


def test_model_that_is_none_of_transformers():
    """A plain module has flags, and nothing to checkpoint."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), peft.LoraConfig(target_modules=["0"])
    )
    record = capture(model.train())
    assert restore(record, model.eval()) == []
    assert model.base_model.model[1].training


def enable(model: Any, arguments: dict[str, bool]) -> None:
    """Switch gradient checkpointing on, by the name that this transformers has for it."""
    base = model.get_base_model()
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(arguments)
    else:
        base.gradient_checkpointing_enable(arguments)


def gradient(model: Any) -> torch.Tensor:
    """The gradient of one adapter weight after a step from the same random numbers."""
    torch.manual_seed(5)
    model.zero_grad()
    ids = torch.arange(4, 12).reshape(1, 8)
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    gradient: torch.Tensor = weight.grad
    return gradient
