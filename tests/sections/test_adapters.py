"""Tests of the section `adapters`."""

from __future__ import annotations

import json
import warnings
from typing import Any

import attrs
import peft
import pytest
import torch
from torch import nn

from peftstate import PeftModel, _work
from peftstate._diff import ABSENT
from peftstate.errors import BaseModelMismatchError
from peftstate.sections import adapters
from peftstate.sections._adapter_config import NOT_IN_CONFIG, canonical_fields, config_fields
from peftstate.sections._view import ModelView
from peftstate.sections.adapters import SECTION, AdaptersRecord

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def capture(model: nn.Module) -> AdaptersRecord:
    """The record of a model, through JSON and back."""
    record = adapters.capture(ModelView.of(model))
    return SECTION.decode(json.loads(json.dumps(SECTION.encode(record))))


def differences(record: AdaptersRecord, model: nn.Module) -> list[str]:
    """The fields that a comparison reports."""
    found = adapters.capture_like(ModelView.of(model), record)
    return [mismatch.field for mismatch in SECTION.compare(record, found)]


def restore(record: AdaptersRecord, model: nn.Module) -> list[str]:
    """Restore a record, and report the fields that still differ."""
    adapters.restore(record, ModelView.of(model))
    return differences(record, model)


@pytest.fixture
def make(load_base, with_lora):
    """Builds a model with two adapters that change the logits, the same each time."""

    def make(kind: str = "fp32", **fields: Any) -> Any:
        torch.manual_seed(1)
        model = with_lora(load_base(kind), **fields)
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        model.add_adapter("second", config)
        return model.eval()

    return make


# What is recorded


def test_record_names_what_is_in_the_file(make, tmp_path):
    """Tensors bear the names of PEFT's file, and the values that are in it."""
    from safetensors.torch import load_file

    from peftstate.sections._tensors import tensor_records

    model = make()
    peft.PeftModel.save_pretrained(model, tmp_path)
    record = capture(model)
    assert list(record.adapters) == ["default", "second"]
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        written = load_file(folder / "adapter_model.safetensors")
        assert record.adapters[name].tensors == tensor_records(written)
        assert record.adapters[name].unsaved == {}
    assert [adapter.folder for adapter in record.adapters.values()] == [".", "second"]


@pytest.mark.parametrize("changes", [False, True])
def test_reading_ahead_finds_the_same(make, monkeypatch, changes):
    """What other threads began to read is what a comparison gives, and a changed value differs."""
    model = make()
    record = capture(model)
    if changes:
        with torch.no_grad():
            model.get_submodule(Q_PROJ).lora_A["default"].weight[0, 0] += 1
    view = ModelView.of(model).now()
    monkeypatch.setattr(_work, "WORTH_A_THREAD", 0)
    with SECTION.read_ahead(view, record):
        monkeypatch.setattr(adapters, "tensor_records", lambda tensors: unread(record, tensors))
        found = adapters.capture_like(view, record)
    path = f"adapters.default.tensors[{Q_PROJ}.lora_A.weight].digest"
    mismatches = SECTION.compare(record, found)
    assert [mismatch.field for mismatch in mismatches] == ([path] if changes else [])
    assert view.read_ahead == {}


def unread(record: AdaptersRecord, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The records of the second adapter, with which no other thread has begun."""
    assert not tensors or tensors.keys() == record.adapters["second"].tensors.keys()
    return {name: record.adapters["second"].tensors[name] for name in tensors}


def test_only_plain_lora_is_read_ahead(load_base):
    """To look for the tensors of another adapter PEFT may run the layers that compute them."""
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    view = ModelView.of(peft.get_peft_model(load_base(), config)).now()
    with SECTION.read_ahead(view, adapters.capture(view)):
        assert view.read_ahead == {}


CONFIGS = {
    "sets": peft.LoraConfig(
        target_modules=["v_proj", "q_proj", "up_proj"], modules_to_save=["norm"]
    ),
    "patterns": peft.LoraConfig(
        target_modules=r".*\.q_proj", rank_pattern={"layers.0": 4}, alpha_pattern={"layers.1": 3}
    ),
    "enums": peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, bias="lora_only", use_rslora=True),
    "nested": peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=3.0)),
    "prompts": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj", "up_proj"],
        feedforward_modules=["up_proj", "down_proj"],
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about combinations of fields
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_has_one_form(config, tmp_path):
    """A config from memory and one from its file are equal, whatever the order of its sets."""
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_bytes())
    fields = config_fields(config)
    assert canonical_fields(written) == fields
    again = config_fields(peft.PeftConfig.from_pretrained(tmp_path))
    assert again == fields
    assert fields.keys().isdisjoint(NOT_IN_CONFIG)


def test_order_of_a_set_makes_no_difference():
    """PEFT writes sets in the order of their hashes, which are other ones in each process."""
    written = {"feedforward_modules": ["up", "down"], "target_modules": ["b", "c", "a"]}
    assert canonical_fields(written) == {
        "feedforward_modules": ["down", "up"],
        "target_modules": ["a", "b", "c"],
    }


def test_every_field_of_the_config_is_compared(make):
    """A run-time edit of a field that PEFT would drop or reinterpret is told."""
    record, model = capture(make()), make()
    model.peft_config["default"].use_rslora = True
    assert differences(record, model) == ["adapters.default.config.use_rslora"]


@pytest.mark.parametrize("name", sorted(NOT_IN_CONFIG))
def test_field_that_is_recorded_elsewhere_is_left_out(name, make):
    """PEFT writes some fields by itself, and some say where, not what."""
    record, model = capture(make()), make()
    setattr(model.peft_config["default"], name, "something else")
    assert differences(record, model) == []


def test_changed_value_names_the_tensor(make):
    """The smallest change of a single number is told, under its name in the file."""
    record, model = capture(make()), make()
    model.get_submodule(Q_PROJ).lora_B["default"].weight.data.view(torch.int32)[0, 0] ^= 1
    name = f"{Q_PROJ}.lora_B.weight"
    assert differences(record, model) == [f"adapters.default.tensors[{name}].digest"]


def test_tensor_in_another_dtype_is_a_difference(make):
    """PEFT loads a bf16 adapter in fp32, in which it computes other numbers."""
    record, model = capture(make()), make()
    layer = model.get_submodule(Q_PROJ).lora_A["second"]
    layer.bfloat16()
    found = differences(record, model)
    assert f"adapters.second.tensors[{Q_PROJ}.lora_A.weight].dtype" in found
    assert all(field.startswith("adapters.second.tensors") for field in found)


def test_missing_and_additional_adapters_are_named(make):
    """A model with other adapters is in another state."""
    record, model = capture(make()), make()
    model.delete_adapter("second")
    assert "adapters.second" in differences(record, model)
    model = make()
    model.add_adapter("third", peft.LoraConfig(target_modules=["v_proj"], r=1))
    assert differences(record, model) == ["adapters.third"]


def test_adapter_may_have_another_name(make, load_base):
    """A record of an adapter compares with it under whatever name it has in the model."""
    record = capture(make()).for_adapters(["default"])
    model = make()
    view = ModelView(model=model, adapters={"default": "default"}, folders={"default": "."})
    assert SECTION.compare(record, adapters.capture_like(view, record)) == ()
    renamed = peft.get_peft_model(
        load_base("fp32"), model.peft_config["default"], adapter_name="other"
    )
    for name, parameter in model.named_parameters():
        if ".default." in name:
            other = dict(renamed.named_parameters())[name.replace(".default.", ".other.")]
            other.data = parameter.data
    view = ModelView(model=renamed, adapters={"default": "other"}, folders={"default": "."})
    assert SECTION.compare(record, adapters.capture_like(view, record)) == ()


def test_tensors_that_peft_does_not_save_are_compared(load_base):
    """VeRA can draw its projections from a seed again: if they come out otherwise, that is told."""

    def make(seed: int) -> Any:
        with pytest.warns(UserWarning, match="save_projection"):
            config = peft.VeraConfig(
                target_modules=["q_proj"], r=2, projection_prng_key=seed, save_projection=False
            )
        return peft.get_peft_model(load_base("fp32"), config)

    record = capture(make(1))
    assert record.adapters["default"].unsaved
    assert differences(record, make(1)) == []
    found = differences(record, make(2))
    assert [field for field in found if field.startswith("adapters.default.unsaved")]


# What is restored


@pytest.mark.parametrize("active", [["second"], ["default", "second"], ["second", "default"]])
def test_active_adapters_are_restored(active, make, logits):
    """One or several, in their order; PEFT's load leaves the first one active."""
    model, other = make(), make()
    model.base_model.set_adapter(active)
    record = capture(model)
    assert record.active == tuple(active)
    assert not torch.equal(logits(other), logits(model))
    assert restore(record, other) == []
    assert torch.equal(logits(other), logits(model))


def test_disabled_adapters_are_restored(make, load_base, logits):
    """A model whose adapters are switched off gives the logits of its base."""
    model, other = make(), make()
    model.base_model.disable_adapter_layers()
    record = capture(model)
    assert record.enabled is False
    assert restore(record, other) == []
    assert torch.equal(logits(other), logits(load_base("fp32")))
    assert restore(capture(make()), other) == []
    assert torch.equal(logits(other), logits(make()))


def test_scaling_that_was_changed_at_run_time_is_restored(make, logits):
    """`set_scale` is nowhere in the config."""
    model, other = make(), make()
    model.get_submodule(Q_PROJ).set_scale("default", 3)
    record = capture(model)
    assert record.adapters["default"].scaling.default == 2.0
    assert record.adapters["default"].scaling.exceptions == {Q_PROJ: 6.0}
    assert restore(record, other) == []
    assert torch.equal(logits(other), logits(model))


def test_usual_scaling_is_restored(make):
    """A layer whose factor was changed since is set back."""
    record, other = capture(make(use_rslora=True)), make(use_rslora=True)
    other.get_submodule(Q_PROJ).scaling["default"] = 0.0
    assert differences(record, other) == ["adapters.default.scaling.exceptions[" + Q_PROJ + "]"]
    assert restore(record, other) == []
    assert other.get_submodule(Q_PROJ).scaling["default"] == 4.0


def test_scaling_of_one_adapter_alone_is_restored(make):
    """A load into a live model leaves the other adapters alone."""
    record, other = capture(make()), make()
    layer = other.get_submodule(Q_PROJ)
    layer.scaling.update({"default": 5.0, "second": 5.0})
    view = ModelView.of(other).limited_to(["second"])
    adapters.restore_scaling(record.for_adapters(["second"]), view)
    assert layer.scaling == {"default": 5.0, "second": 4.0}


@pytest.mark.parametrize("names", [["default"], ["default", "second"], ["second", "default"]])
def test_merged_adapters_are_merged_again(names, make, logits):
    """In the same order, since merging rounds; and they can be taken out again."""
    model, other = make("bf16"), make("bf16")
    model.base_model.set_adapter(names)
    model.merge_adapter(names)
    record = capture(model)
    assert record.merged == tuple(names)
    assert restore(record, other) == []
    assert torch.equal(logits(other), logits(model))
    weights = [found.get_submodule(f"{Q_PROJ}.base_layer").weight for found in (model, other)]
    assert torch.equal(*weights)
    other.unmerge_adapter()
    assert differences(record, other) == [f"merged[{name}]" for name in sorted(names)]


def test_adapters_that_are_not_there_are_left_out(make):
    """A record that is narrowed to some adapters restores those."""
    record = capture(make()).for_adapters(["second"])
    assert record.adapters.keys() == {"second"}
    assert record.active == ()
    assert attrs.evolve(record, active=("default",)).for_adapters(["second"]).active == ()


# Loads


def both_active(model: Any) -> Any:
    """Two adapters at once, one of them at another scale."""
    model.base_model.set_adapter(["default", "second"])
    model.get_submodule(Q_PROJ).set_scale("second", 0.5)
    return model


@pytest.mark.parametrize(
    "change",
    [
        both_active,
        lambda model: both_active(model).merge_adapter(),
        lambda model: both_active(model).base_model.disable_adapter_layers(),
        lambda model: model.set_adapter("second"),
    ],
    ids=["active and scaled", "merged", "disabled", "second active"],
)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.filterwarnings("ignore:Merge lora module to [48]-bit linear:UserWarning")
def test_load_gives_the_adapters_in_their_state(  # noqa: PLR0917 - fixtures
    kind, change, make, tmp_path, load_base, logits
):
    """The logits after save and load are those before, to the last bit."""
    model = make(kind)
    change(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(kind), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["mlp", "layers", "q_proj", "lora_A"])
def test_adapter_named_like_a_module_costs_the_others_nothing(
    name, tmp_path, load_base, with_lora, logits
):
    """PEFT drops from a file what has another adapter's name in its own (peft#3584).

    It warns of that when it loads, which it must not, for the sidecar has it.
    """
    model = with_lora(load_base("fp32"))
    model.add_adapter(name, peft.LoraConfig(target_modules=["v_proj"], r=2))
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base("fp32"), tmp_path)
    assert torch.equal(logits(loaded), expected)


def test_other_words_of_peft_are_heard(tmp_path, load_base, with_lora, monkeypatch):
    """Only what the sidecar has is not warned of, and only by PEFT's one warning."""
    model = with_lora(load_base())
    model.add_adapter("mlp", peft.LoraConfig(target_modules=["v_proj"], r=2))
    model.save_pretrained(tmp_path)
    load = peft.PeftModel.from_pretrained.__func__

    def talkative(*args: Any, **keywords: Any) -> Any:
        missing = "Found missing adapter keys while loading the checkpoint: ['a.b']."
        warnings.warn(missing, stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)
        return load(*args, **keywords)

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", classmethod(talkative))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(load_base(), tmp_path, is_trainable=False)
    texts = [str(item.message) for item in caught if item.filename == __file__]
    assert texts == [
        "Found missing adapter keys while loading the checkpoint: ['a.b'].",
        "something else",
    ]
    assert sum("missing adapter keys" in str(item.message) for item in caught) == 1


def test_no_adapters_to_save(tmp_path, load_base, with_lora):
    """An empty selection is a mistake of the caller, and is called so."""
    with pytest.raises(ValueError, match="selected_adapters is empty") as caught:
        with_lora(load_base()).save_pretrained(tmp_path, selected_adapters=[])
    assert str(caught.value) == (
        "selected_adapters is empty, so there is nothing to save; leave it out to save all "
        "adapters, or name some of ['default']."
    )
    assert list(tmp_path.iterdir()) == []


def test_layers_that_are_left_out(tmp_path, load_base, with_lora):
    """`layer_replication` can drop a layer, of which the base model in memory is then without."""
    model = with_lora(load_base(), layer_replication=[(0, 1), (0, 1)])
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseModelMismatchError) as caught:
        PeftModel.from_pretrained(load_base(), tmp_path)
    names = sorted(f"model.layers.1.{name}" for name in LAYER)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(names)} values differ from the saved state:"
    assert lines[-2:] == [
        "Load the base model that the adapter was trained on, at the same revision.",
        'To load all the same, pass on_mismatch={"base_model": "warn"}.',
    ]
    assert [(item.field, item.saved) for item in caught.value.mismatches] == [
        (f"tensors[{name}]", ABSENT) for name in names
    ]


LAYER = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    *(
        f"self_attn.{name}_proj.{leaf}"
        for name in ("k", "o", "q", "v")
        for leaf in ("bias", "weight")
    ),
]
"""The tensors of a layer of the tiny Llama."""
