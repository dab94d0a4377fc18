"""Tests of the section `implementation`."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import accelerate
import attrs
import datasets
import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import peftstate
from peftstate.errors import StateMismatchWarning
from peftstate.sections import implementation
from peftstate.sections._view import ModelView
from peftstate.sections.implementation import SECTION, AutocastRecord, ImplementationRecord


def capture(model: nn.Module) -> ImplementationRecord:
    """The record of a model, through JSON and back."""
    record = implementation.capture(ModelView.of(model))
    return SECTION.decode(json.loads(json.dumps(SECTION.encode(record))))


def restore(record: ImplementationRecord, model: nn.Module) -> list[str]:
    """Restore a record, and report what still differs."""
    implementation.restore(record, ModelView.of(model))
    return [str(mismatch) for mismatch in SECTION.compare(record, capture(model))]


@pytest.fixture
def models(load_base, with_lora):
    """Two equal models in eval mode."""

    def make() -> Any:
        torch.manual_seed(1)
        return with_lora(load_base("bf16")).eval()

    return make(), make()


# Attention and experts


@pytest.mark.parametrize(("saved", "found"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_attention_is_restored(saved, found, models, logits):
    """The two compute the same function with other last bits."""
    model, other = models
    model.set_attn_implementation(saved)
    other.set_attn_implementation(found)
    record = capture(model)
    assert record.attention == {"": saved}
    assert restore(record, other) == []
    assert torch.equal(logits(other), logits(model))


def llava() -> Any:
    """A model with a text model and a vision model in it."""
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    )


def test_attention_of_parts_is_restored():
    """A composite model has an implementation for each of its parts."""
    model, other = llava(), llava()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    other.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    record = capture(model)
    assert record.attention["text_config"] == "eager"
    assert record.attention["vision_config"] == "sdpa"
    assert restore(record, other) == []


@pytest.mark.parametrize(
    "name", ["kernels-community/flash-attn", "owner/repo@main:function", "new"]
)
def test_only_implementations_of_the_table_are_set(name, models, monkeypatch):
    """The name of a kernel repository would have transformers run code from the Hub."""
    _, other = models
    record = attrs.evolve(capture(other), attention={"": name}, experts={"": name})
    handed: list[Any] = []
    for setter in ("set_attn_implementation", "set_experts_implementation"):
        monkeypatch.setattr(type(other.get_base_model()), setter, handed.append, raising=False)
    differences = restore(record, other)
    assert handed == []
    assert [difference.partition(":")[0] for difference in differences] == [
        "implementation.attention[]",
        "implementation.experts[]",
    ]


class Mixture(nn.Module):
    """What transformers 5 shows of a mixture of experts."""

    def __init__(self, experts: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(_experts_implementation=experts)

    def set_experts_implementation(self, experts: dict[str, str]) -> None:
        """Set it, by sub-config."""
        self.config._experts_implementation = experts[""]


@pytest.mark.parametrize("saved", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("found", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_restored(saved, found):
    """Eager ones, all that older versions of transformers have, are not recorded."""
    record = capture(Mixture(saved))
    assert record.experts == ({} if saved == "eager" else {"": saved})
    other = Mixture(found)
    assert restore(record, other) == []
    assert other.config._experts_implementation == saved


def test_model_without_a_config():
    """A plain module has no implementations."""
    record = capture(nn.Linear(1, 1))
    assert record.attention == {}
    assert restore(record, nn.Linear(1, 1)) == []


# accelerate's autocast wrapper


@pytest.fixture
def accelerator():
    """What `Trainer` prepares a model with under ``bf16=True``; its state is the process's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state


@pytest.fixture
def fp32_models(load_base, with_lora):
    """Two equal models, in the dtype in which autocast makes a difference."""

    def make() -> Any:
        torch.manual_seed(1)
        return with_lora(load_base("fp32")).eval()

    return make(), make()


def test_autocast_wrapper_is_restored(accelerator, fp32_models, logits):
    """Trainers leave it on the model that they trained, and it changes what calling it gives."""
    model, other = fp32_models
    plain = logits(model)
    accelerator.prepare_model(model)
    record = capture(model)
    assert record.autocast == AutocastRecord(dtype="bfloat16", enabled=True, cache_enabled=True)
    assert not torch.equal(logits(model), plain)
    assert restore(record, other) == []
    assert torch.equal(logits(other), logits(model))
    assert logits(other).dtype == torch.float32
    assert accelerator.unwrap_model(other, keep_fp32_wrapper=False) is other
    assert torch.equal(logits(other), plain)


def test_autocast_wrapper_is_restored_over_hooks(accelerator, fp32_models, logits):
    """PEFT puts accelerate's hooks on a model that is not all on one device."""
    model, other = fp32_models
    accelerator.prepare_model(model)
    record = capture(model)
    accelerate.hooks.add_hook_to_module(other, accelerate.hooks.ModelHook())
    assert restore(record, other) == []
    assert torch.equal(logits(other), logits(model))
    assert logits(other).dtype == torch.float32


def test_autocast_wrapper_is_taken_off(accelerator, fp32_models, logits):
    """A model that was saved without it is restored without it."""
    model, other = fp32_models
    record = capture(model)
    assert record.autocast is None
    accelerator.prepare_model(other)
    assert restore(record, other) == []
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("dtype", ["float64", "nn", "int8"])
def test_other_dtypes_are_not_autocast_to(dtype, fp32_models):
    """A manifest may say what accelerate says, and nothing else."""
    model, _ = fp32_models
    autocast = AutocastRecord(dtype=dtype, enabled=True, cache_enabled=True)
    record = attrs.evolve(capture(model), autocast=autocast)
    (difference,) = restore(record, model)
    assert difference.startswith("implementation.autocast: saved {")
    assert "forward" not in vars(model)


# Hooks and kernels


def test_hook_of_gradient_checkpointing_is_restored(models):
    """With frozen embeddings, inputs must be made to require gradients."""
    model, other = models
    model.enable_input_require_grads()
    record = capture(model)
    assert list(record.hooks) == ["model.embed_tokens"]
    assert restore(record, other) == []
    embedded = other.get_input_embeddings()(torch.ones(1, 1, dtype=torch.long))
    assert embedded.requires_grad


def test_hooks_of_a_qlora_training_are_restored(load_base, with_lora):
    """PEFT sets the hook when it prepares the base model, and again when it wraps it."""
    record = capture(with_lora(peft.prepare_model_for_kbit_training(load_base("nf4"))))
    assert restore(record, with_lora(load_base("nf4"))) == []


def test_hook_of_gradient_checkpointing_is_taken_off(load_base, with_lora):
    """A base model that was prepared for training again fits one that was saved without."""
    record = capture(with_lora(load_base("nf4")))
    other = with_lora(peft.prepare_model_for_kbit_training(load_base("nf4")))
    assert capture(other).hooks
    assert restore(record, other) == []


def test_other_hooks_are_a_difference(models):
    """A hook is code, which no manifest brings back; NEFTune leaves one if it is interrupted."""
    model, other = models

    def neftune(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1

    model.get_input_embeddings().register_forward_hook(neftune)
    record = capture(model)
    (difference,) = restore(record, other)
    assert difference.startswith("implementation.hooks[model.embed_tokens]: saved [")
    assert "neftune" in difference
    (difference,) = restore(capture(other), model)
    assert "saved absent" in difference


def test_kernels_that_were_patched_in_are_a_difference(models, monkeypatch):
    """Liger and Unsloth replace the `forward` of a class; they are not on disk."""
    model, other = models
    norm = type(other.get_base_model().model.norm)

    def forward(_self: Any, states: torch.Tensor) -> torch.Tensor:
        return states

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    record = capture(model)
    monkeypatch.setattr(norm, "forward", forward)
    assert capture(other).kernels == {norm.__name__: "liger_kernel.transformers.rms_norm"}
    (difference,) = restore(record, other)
    assert difference.startswith(f"implementation.kernels.{norm.__name__}: saved absent")


def test_kernels_on_a_single_module_are_seen(models):
    """Unsloth patches instances, too."""
    model, _ = models
    layer = model.get_base_model().model.layers[0].mlp
    forward = layer.forward.__func__

    def patched(*args: Any) -> Any:
        return forward(layer, *args)

    patched.__module__ = "unsloth.kernels"
    layer.forward = patched
    assert capture(model).kernels == {type(layer).__name__: "unsloth.kernels"}


# Trainings


@pytest.fixture
def trained(load_base, tmp_path):
    """Trains a model for two steps, and saves it after each: `trained(**arguments)`."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def train(**arguments: Any) -> Any:
        model = peft.get_peft_model(
            load_base(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        )
        row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                tmp_path / "run", max_steps=2, save_steps=1, report_to=[], use_cpu=True, **arguments
            ),
            train_dataset=datasets.Dataset.from_list([row] * 4),
            callbacks=[peftstate.PeftStateCallback()],
        )
        trainer.train()
        trainer.save_model(tmp_path / "final")
        return trainer.model

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


def load(load_base: Any, folder: Any) -> Any:
    """Load a folder for inference."""
    return peftstate.PeftModel.from_pretrained(load_base(), folder, is_trainable=False)


def test_neftune_is_told_of_a_checkpoint_in_the_middle(trained, load_base, logits, tmp_path):
    """The hook adds noise while training only, and the trainer takes it off at the end."""
    model = trained(neftune_noise_alpha=5.0).eval()
    hooks = r"hooks\[model\.embed_tokens\]: saved \[.*neftune_post_forward_hook"
    with pytest.warns(StateMismatchWarning, match=hooks):
        checkpoint = load(load_base, tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(checkpoint), logits(model))
    record = peftstate.read_manifest(tmp_path / "final").sections["implementation"]
    assert not any("neftune" in name for names in record.hooks.values() for name in names)
    assert torch.equal(logits(load(load_base, tmp_path / "final")), logits(model))


# accelerate, of how it enters autocast
@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")
def test_the_autocast_of_a_training_is_in_its_saves(trained, load_base, logits, tmp_path):
    """Under ``bf16=True`` the model in memory computes in bf16, and so does what is reloaded."""
    model = trained(bf16=True).eval()
    expected = logits(model)
    for folder in ("run/checkpoint-2", "final"):
        loaded = load(load_base, tmp_path / folder)
        assert capture(loaded).autocast == AutocastRecord(
            dtype="bfloat16", enabled=True, cache_enabled=True
        )
        assert torch.equal(logits(loaded), expected)
    plain = peft.PeftModel.from_pretrained(load_base(), tmp_path / "final").eval()
    assert not torch.equal(logits(plain), expected)


def test_kernels_of_a_training_are_told(load_base, with_lora, tmp_path, monkeypatch):
    """A model that was saved under Liger's kernels, and is loaded in a process without them."""
    model = with_lora(load_base()).eval()
    norm = type(model.get_base_model().model.norm)
    plain = norm.forward

    def forward(self: Any, states: torch.Tensor) -> Any:
        return plain(self, states)

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    monkeypatch.setattr(norm, "forward", forward)
    model.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.warns(
        StateMismatchWarning,
        match=r"kernels\.LlamaRMSNorm: saved 'liger_kernel\.transformers\.rms_norm', found absent",
    ):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


HOOKED = {
    "model.layers.1.self_attn": lambda model: model.get_base_model().model.layers[1].self_attn,
    "model.layers.0.self_attn.q_proj": lambda model: (
        model.get_base_model().model.layers[0].self_attn.q_proj  # a layer of PEFT
    ),
    "base_model": lambda model: model.base_model,
}
"""Modules that hooks may hang on, by the names that a manifest has."""


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("module", HOOKED)
def test_a_hook_that_was_left_behind_is_told(kind, module, load_base, with_lora, tmp_path):
    """On whatever module, before or after its forward."""
    model = with_lora(load_base()).eval()
    layer = HOOKED[module](model)

    def probe(*_: Any) -> None:
        """Changes nothing, which nobody can know."""

    register = layer.register_forward_pre_hook if kind == "pre" else layer.register_forward_hook
    register(probe)
    model.save_pretrained(tmp_path)
    name = r"hooks[\[.]" + re.escape(module) + r"\]?: saved \[.*probe"
    with pytest.warns(StateMismatchWarning, match=name):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


def test_the_hook_of_gradient_checkpointing_on_wrapped_embeddings(load_base, with_lora, tmp_path):
    """It hangs on the layer of PEFT that stands in for them, and comes back below it."""
    model = with_lora(load_base(), modules_to_save=["embed_tokens"]).eval()
    model.enable_input_require_grads()
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert list(capture(loaded).hooks) == ["model.embed_tokens"]
    assert peftstate.verify(loaded, tmp_path).ok
