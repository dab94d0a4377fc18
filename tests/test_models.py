"""The model classes: what a save and a load promise."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
import warnings

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig

import peftstate
from peftstate import errors

CLASSES = [name for name in peftstate.__all__ if name.startswith("PeftModel")]


@pytest.fixture
def model(load_base, with_lora):
    """A LoRA model in bf16, in train mode, with an edited generation config."""
    model = with_lora(load_base("bf16"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # as TRL does
            parameter.data = parameter.data.bfloat16()
    model.generation_config.max_new_tokens = 7
    model.generation_config.eos_token_id = [2, 9]
    return model.train()


@pytest.fixture
def saved(model, tmp_path):
    """The folder that `model` was saved to."""
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def quiet_load(*args, **kwargs):
    """`PeftModel.from_pretrained`, without the warning of train mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.TrainModeWarning)
        return peftstate.PeftModel.from_pretrained(*args, **kwargs)


def next_numbers():
    """The next number of each generator."""
    return random.random(), float(np.random.random()), float(torch.rand(1))


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_pefts_by_name_and_by_inheritance(name):
    """Each class bears the name of PEFT's and is a subclass of it and of our `PeftModel`."""
    ours, theirs = getattr(peftstate, name), getattr(peft, name)
    assert ours.__name__ == theirs.__name__
    assert issubclass(ours, theirs)
    assert issubclass(ours, peftstate.PeftModel)


def test_get_peft_model_gives_our_class_which_pickles_and_copies(model, logits):
    """A wrapped model is of our class, `isinstance` of PEFT's, and survives pickle and deepcopy."""
    assert type(model) is peftstate.PeftModelForCausalLM
    assert isinstance(model, peft.PeftModelForCausalLM)
    expected = logits(model.eval())
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301
        assert type(twin) is type(model)
        assert torch.equal(logits(twin), expected)


def test_attach_makes_pefts_own_model_ours(load_base, logits):
    """`attach` changes the class in place, once, and nothing of what the model computes."""
    theirs = peft.get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM")).eval()
    expected = logits(theirs)
    ours = peftstate.attach(theirs)
    assert ours is theirs
    assert peftstate.attach(ours) is ours
    assert type(ours) is peftstate.PeftModelForCausalLM
    assert torch.equal(logits(ours), expected)


def test_attach_refuses_what_is_no_peft_model(load_base):
    """A bare base model cannot be attached to; the error names the classes that can."""
    with pytest.raises(TypeError, match="cannot attach to a LlamaForCausalLM; it must be one of"):
        peftstate.attach(load_base())


def test_reload_is_the_saved_model_in_the_saved_state(model, saved, load_base, logits):
    """Values, dtypes, flags, generation config and random generators are as they were saved."""
    expected_numbers = next_numbers()
    with pytest.warns(errors.TrainModeWarning, match="dropout is on"):
        loaded = peftstate.PeftModel.from_pretrained(load_base("bf16"), saved)
    assert next_numbers() == expected_numbers
    assert type(loaded) is type(model)
    assert {name: module.training for name, module in loaded.named_modules()} == {
        name: module.training for name, module in model.named_modules()
    }
    assert {name: (p.dtype, p.requires_grad) for name, p in loaded.named_parameters()} == {
        name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()
    }
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_load_for_inference_touches_nothing_of_the_process(model, saved, load_base, logits):
    """With `is_trainable=False` the model is frozen, in eval mode, and no generator moves."""
    torch.manual_seed(77)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loaded = peftstate.PeftModel.from_pretrained(load_base("bf16"), saved, is_trainable=False)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_load_for_training_makes_a_frozen_adapter_trainable(load_base, with_lora, tmp_path):
    """With `is_trainable=True` an adapter that was saved frozen can be trained, as in PEFT."""
    model = with_lora(load_base()).eval()
    model.requires_grad_(requires_grad=False)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, is_trainable=True)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_saving_leaves_the_live_model_alone(load_base, with_lora, logits, tmp_path):
    """A 4-bit model that has run keeps its logits over a save; PEFT's own save moves them."""
    model = with_lora(load_base("nf4")).eval()
    before = logits(model)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(model), before)


def test_the_folder_is_an_ordinary_adapter(model, saved, load_base, logits):
    """Plain PEFT loads the folder, to the same values but for the dtype that it casts to."""
    theirs = peft.PeftModel.from_pretrained(load_base("bf16"), saved, autocast_adapter_dtype=False)
    assert type(theirs) is peft.PeftModelForCausalLM
    assert torch.equal(logits(theirs), logits(model.eval()))


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("nf4", errors.QuantizationMismatchError, "quantization.method: saved None"),
        ("int8", errors.QuantizationMismatchError, "quantization.method: saved None"),
    ],
)
def test_a_base_quantized_otherwise_is_refused(saved, load_base, kind, error, text):
    """A base model in another quantization raises, and is left as it was."""
    base = load_base(kind)
    before = {name: (id(p), p.dtype) for name, p in base.named_parameters()}
    with pytest.raises(error, match=text):
        peftstate.PeftModel.from_pretrained(base, saved)
    assert {name: (id(p), p.dtype) for name, p in base.named_parameters()} == before


def test_one_changed_weight_of_the_base_is_named(saved, load_base):
    """A base model with one other value raises, and the error names the tensor."""
    base = load_base("bf16")
    base.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    with pytest.raises(errors.BaseModelMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(base, saved)
    [mismatch] = caught.value.mismatches
    assert mismatch.field == "tensors[model.layers.1.mlp.up_proj.weight].digest"


def test_a_base_in_a_wider_dtype_comes_back_in_the_saved_one(model, saved, load_base, logits):
    """The same checkpoint in fp32 is cast to the bf16 that was saved, bit for bit."""
    loaded = quiet_load(load_base("fp32"), saved)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_no_manifest_loads_as_peft_does_with_a_warning(saved, load_base, logits):
    """An adapter without a manifest is loaded as PEFT loads it, and can be saved with one."""
    (saved / "peftstate.json").unlink()
    with pytest.warns(errors.MissingManifestWarning, match="there is no peftstate manifest"):
        loaded = peftstate.PeftModel.from_pretrained(load_base("bf16"), saved)
    theirs = peft.PeftModel.from_pretrained(load_base("bf16"), saved)
    assert type(loaded) is peftstate.PeftModelForCausalLM
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(theirs))


def test_a_required_manifest_that_is_missing_raises(saved, load_base):
    """With `require_manifest` an adapter without a manifest is refused."""
    (saved / "peftstate.json").unlink()
    with pytest.raises(errors.ManifestNotFoundError):
        peftstate.PeftModel.from_pretrained(load_base("bf16"), saved, require_manifest=True)


def test_tensors_missing_renamed_or_of_another_file_are_refused(
    saved, load_base, with_lora, tmp_path
):
    """Weights that are not the saved ones raise `IntegrityError`, which names the tensor."""
    from safetensors.torch import load_file, save_file

    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    other = with_lora(load_base("bf16"))
    other.save_pretrained(tmp_path / "other")
    damaged = {
        "missing": {key: value for key, value in tensors.items() if key != name},
        "renamed": {key + (".x" if key == name else ""): value for key, value in tensors.items()},
        "another file": load_file(tmp_path / "other" / "adapter_model.safetensors"),
    }
    for what, content in damaged.items():
        save_file(content, weights)
        with pytest.raises(errors.IntegrityError) as caught:
            peftstate.PeftModel.from_pretrained(load_base("bf16"), saved)
        assert caught.value.file.startswith(str(weights)), what


def test_an_edited_config_is_refused_by_its_field(saved, load_base):
    """A field of adapter_config.json that was edited raises `AdapterMismatchError`."""
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 64}))
    with pytest.raises(errors.AdapterMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(load_base("bf16"), saved)
    assert [str(mismatch) for mismatch in caught.value.mismatches] == [
        "adapters.adapters.default.config.lora_alpha: saved 8, found 64"
    ]


def test_what_is_ignored_is_not_restored(saved, load_base):
    """A section that is ignored is left as PEFT loads it; one that warns is restored."""
    torch.manual_seed(77)
    before = torch.get_rng_state()
    loaded = peftstate.PeftModel.from_pretrained(
        load_base("bf16"), saved, on_mismatch={"rng": "ignore", "training": "ignore"}
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert loaded.generation_config.max_new_tokens == 7


def test_on_mismatch_refuses_unknown_words(saved, load_base):
    """An unknown section or action is a `ValueError` that names those there are."""
    base = load_base("bf16")
    with pytest.raises(ValueError, match="there is no section 'weights'"):
        peftstate.PeftModel.from_pretrained(base, saved, on_mismatch={"weights": "warn"})
    with pytest.raises(ValueError, match="'skip' is none of"):
        peftstate.PeftModel.from_pretrained(base, saved, on_mismatch="skip")


def test_all_adapters_come_back_active_ones_included(load_base, with_lora, logits, tmp_path):
    """Every adapter is loaded from its own folder, and the active ones are active again."""
    model = with_lora(load_base())
    model.add_adapter("ref", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "ref"])
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = quiet_load(load_base(), tmp_path)
    assert list(loaded.peft_config) == ["default", "ref"]
    assert loaded.active_adapters == ["default", "ref"]
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_limits_what_is_loaded(load_base, with_lora, tmp_path):
    """`adapters=` leaves the others out; the folder's own is always loaded."""
    model = with_lora(load_base())
    model.add_adapter("ref", LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    loaded = quiet_load(load_base(), tmp_path, adapters=())
    assert list(loaded.peft_config) == ["default"]
    with pytest.raises(ValueError, match="has no adapter 'nobody'"):
        quiet_load(load_base(), tmp_path, adapters=("nobody",))


def test_the_folder_of_an_extra_adapter_is_complete_in_itself(
    load_base, with_lora, logits, tmp_path
):
    """A sub-folder that was moved away loads as the model with that adapter alone."""
    model = with_lora(load_base())
    model.add_adapter("ref", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "all")
    shutil.move(tmp_path / "all" / "ref", tmp_path / "moved")
    loaded = quiet_load(load_base(), tmp_path / "moved", adapter_name="mine")
    assert list(loaded.peft_config) == ["mine"]
    model.set_adapter("ref")
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_a_name_that_another_adapter_has_is_refused(load_base, with_lora, tmp_path):
    """The folder's own adapter cannot be given the name of another one in the folder."""
    model = with_lora(load_base())
    model.add_adapter("ref", LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter_name='ref' is also the name of another adapter"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path, adapter_name="ref")


def test_selected_adapters_are_saved_alone(load_base, with_lora, tmp_path):
    """`selected_adapters` limits folders and manifest; an unknown name is PEFT's `ValueError`."""
    model = with_lora(load_base())
    model.add_adapter("ref", LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path, selected_adapters=["ref"])
    assert not (tmp_path / "peftstate.json").exists()
    assert list(peftstate.read_manifest(tmp_path / "ref").sections["adapters"].adapters) == ["ref"]
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])


def test_a_process_that_is_not_the_main_one_writes_nothing(model, tmp_path):
    """With `is_main_process=False` no file is written, as in PEFT."""
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()] == []


def test_saving_over_a_file_is_refused_as_in_peft(model, tmp_path):
    """A path that is a file is PEFT's `ValueError`."""
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(path)


def test_equal_states_give_equal_bytes(model, tmp_path):
    """Two saves of the same state differ in no byte of manifest and sidecar."""
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    for name in ("peftstate.json", "peftstate.tensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "one" / "peftstate.json").read_text()
