"""Tests of the walk over a model: which tensor belongs to what, under which name."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from peftstate import _modules
from peftstate.sections import _walk

# PEFT, of what it takes for an unknown kind of norm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


def lora(**fields: Any) -> peft.LoraConfig:
    """The config of a small LoRA with random weights."""
    return peft.LoraConfig(r=2, init_lora_weights=False, **fields)


CONFIGS: dict[str, peft.PeftConfig] = {
    "lora": lora(target_modules=["q_proj", "down_proj"]),
    "lora on embeddings": lora(target_modules=["embed_tokens", "lm_head"]),
    "modules to save": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trainable tokens": lora(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "dora": lora(target_modules=["q_proj"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "vera": peft.VeraConfig(target_modules=["q_proj"], r=2),
    "prompts": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefixes": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "adaption prompts": peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1
    ),
}


def sites_of(model: Any) -> list[_walk.Site]:
    """The modules of a model and of all its adapters."""
    return _walk.sites(model, getattr(model, "peft_config", ()))


def tensors_of(model: Any) -> list[_walk.TensorSite]:
    """The tensors of a model and of all its adapters."""
    return _walk.tensors(model, sites_of(model))


def part_of(model: nn.Module, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part of a model by name."""
    return {site.name: site.tensor for site in tensors_of(model) if site.part == part}


def wrapped(base: nn.Module, config: peft.PeftConfig, adapter: str = "default") -> peft.PeftModel:
    """A base model with an adapter."""
    # PEFT writes into the config
    return peft.get_peft_model(base, copy.deepcopy(config), adapter_name=adapter)


@pytest.fixture(params=CONFIGS.values(), ids=list(CONFIGS))
def config(request):
    """An adapter of each kind."""
    return request.param


def test_base_has_the_same_names_with_and_without_an_adapter(config, load_base):
    """A wrapped base model is described as the bare one, name for name, value for value."""
    bare = part_of(load_base("bf16"), "base")
    found = part_of(wrapped(load_base("bf16"), config), "base")
    assert list(found) == list(bare)
    assert all(torch.equal(found[name], bare[name]) for name in bare)


def test_names_of_a_bare_model_are_those_of_its_checkpoint(load_base):
    """They are torch's own, which the files of the model bear."""
    model = load_base("bf16")
    assert part_of(model, "base").keys() == {
        name for name, _ in [*model.named_parameters(), *model.named_buffers()]
    }


def test_modules_have_the_same_names_with_and_without_an_adapter(config, load_base):
    """Modules of the base model are found under their original names, too."""
    base = load_base("bf16")
    bare = {name: type(module) for name, module in base.named_modules()}
    sites = [site for site in sites_of(wrapped(base, config)) if site.part == "base"]
    assert {site.name: type(site.module) for site in sites} == bare
    assert len(sites) == len(bare)


def test_every_tensor_belongs_somewhere(config, load_base):
    """No parameter or buffer is overlooked, and no two have the same name in the same part.

    There may be more: layers of an adapter that PEFT has taken out of the model for now.
    """
    model = wrapped(load_base("bf16"), config)
    if not (peft.__version__ < "0.18" and config.peft_type == "ADAPTION_PROMPT"):
        model.add_adapter("second", config)  # the oldest PEFT leaves the first one's layers about
    sites = list(tensors_of(model))
    expected = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    assert expected <= {id(site.tensor) for site in sites}
    assert len({(site.part, site.adapter, site.name) for site in sites}) == len(sites)


@pytest.mark.parametrize("name", ["other", "mlp", "q_proj", "lora_A", "base_layer", "weight"])
def test_adapter_has_the_same_names_under_another_name(name, config, load_base):
    """An adapter may get another name when it is loaded, even that of a module."""
    original = wrapped(load_base("bf16"), config)
    try:
        renamed = wrapped(load_base("bf16"), config, name)
    except (ValueError, KeyError) as error:
        pytest.fail(f"PEFT takes no adapter of that name: {error}")
    assert list(part_of(renamed, "adapter")) == list(part_of(original, "adapter"))
    owners = {site.adapter for site in tensors_of(renamed) if site.part == "adapter"}
    assert owners == {name}


def test_adapters_are_told_apart(load_base):
    """Of two adapters on the same layers each has its own tensors, under the same names."""
    model = wrapped(load_base("bf16"), CONFIGS["lora"])
    model.add_adapter("second", CONFIGS["lora"])
    by_adapter: dict[str | None, dict[str, int]] = {}
    for site in tensors_of(model):
        if site.part == "adapter":
            by_adapter.setdefault(site.adapter, {})[site.name] = id(site.tensor)
    first, second = by_adapter["default"], by_adapter["second"]
    assert first.keys() == second.keys()
    assert set(first.values()).isdisjoint(second.values())


def test_adapter_on_other_layers_has_no_part_in_them(load_base):
    """An adapter is in the layers that it targets."""
    model = wrapped(load_base("bf16"), CONFIGS["lora"])
    model.add_adapter("second", lora(target_modules=["v_proj"]))
    names = [site.name for site in tensors_of(model) if site.adapter == "second"]
    assert len(names) == 4
    assert all("v_proj.lora_" in name for name in names)


def test_tied_embeddings_are_listed_under_both_names(load_base, tied_lm):
    """As in a state dict; a model that came untied has two tensors there."""
    model = load_base("bf16", tied_lm)
    tensors = part_of(wrapped(model, CONFIGS["lora"]), "base")
    assert tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]


def test_weight_with_a_trained_copy_is_shadowed(load_base):
    """What `modules_to_save` copies need not be the same in the base model, nothing else may."""
    sites = list(tensors_of(wrapped(load_base("bf16"), CONFIGS["modules to save"])))
    shadowed = {site.name for site in sites if site.shadowed}
    assert shadowed == {"lm_head.weight"}
    copies = [site.name for site in sites if site.adapter and "lora_" not in site.name]
    assert len(copies) == 1


def test_merged_weights_are_marked(load_base):
    """A weight with an adapter merged into it is not the checkpoint's; the others are."""
    model = wrapped(load_base("fp32"), CONFIGS["lora"])
    assert not [site for site in tensors_of(model) if site.merged]
    model.merge_adapter()
    merged = {site.name for site in tensors_of(model) if site.merged}
    assert "model.layers.0.self_attn.q_proj.weight" in merged
    assert not [name for name in merged if "q_proj" not in name and "down_proj" not in name]
    model.unmerge_adapter()
    assert not [site for site in tensors_of(model) if site.merged]


def test_buffers_that_checkpoints_do_not_hold_are_told_apart(load_base):
    """Rotary frequencies come from the config."""
    persistent = {site.name: site.persistent for site in tensors_of(load_base("bf16"))}
    assert not persistent["model.rotary_emb.inv_freq"]
    assert persistent["lm_head.weight"]


def test_compiled_base_has_its_original_names(load_base):
    """`torch.compile` puts a wrapper around a model, which is looked through."""
    base = load_base("bf16")
    model = wrapped(base, CONFIGS["lora"])
    names = list(part_of(model, "base"))
    model.base_model.model = torch.compile(base)
    assert _walk.base_of(model) is base
    assert list(part_of(model, "base")) == names


def test_replaced_parameter_stays_the_parameter(load_base):
    """Data of another dtype goes into the parameter that the optimizer and ties refer to."""
    model = load_base("bf16")
    weight = model.lm_head.weight
    (site,) = (site for site in tensors_of(model) if site.name == "lm_head.weight")
    site.replace(torch.ones(64, 64))
    assert model.lm_head.weight is weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, torch.ones(64, 64))


def test_replaced_buffer_stays_a_buffer():
    """A buffer is put in its place, and stays one."""
    model = nn.BatchNorm1d(3)
    (site,) = (site for site in tensors_of(model) if site.leaf == "running_mean")
    site.replace(torch.ones(3, dtype=torch.float64))
    assert dict(model.named_buffers())["running_mean"].dtype == torch.float64


def test_model_without_adapters_is_its_own_base(load_base):
    """A bare base model is no PEFT model, and all of it is base."""
    base = load_base("bf16")
    assert not _walk.is_peft_model(base)
    assert _walk.base_of(base) is base
    assert {site.part for site in tensors_of(base)} == {"base"}


def test_only_containers_are_containers():
    """They hold layers and tensors by key, and run nothing."""
    assert _modules.is_container(nn.ModuleDict())
    assert _modules.is_container(nn.ParameterDict())
    assert not _modules.is_container(nn.ModuleList())
    assert not _modules.is_container(nn.Linear(1, 1))
