"""Saves: what is written, and what happens when a state cannot be saved."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig

import peftstate
from peftstate import errors

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


def test_a_state_that_cannot_be_captured_is_rescued(load_base, with_lora, monkeypatch, tmp_path):
    """The old files stay, and what PEFT saves is in a folder that the error names."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def fail(view):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("peftstate._saving.capture_sections", fail)
    with pytest.raises(errors.SaveError) as caught:
        model.save_pretrained(tmp_path / "adapter")
    rescued = tmp_path / "adapter.rescued-0"
    assert str(caught.value) == (
        "The state of the model cannot be saved: RuntimeError: out of luck. No old file was "
        f"replaced. What could be saved is in {rescued}."
    )
    assert caught.value.rescued == str(rescued)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert peft.PeftModel.from_pretrained(load_base(), rescued)


def test_a_second_rescue_does_not_overwrite_the_first(load_base, with_lora, monkeypatch, tmp_path):
    """Every rescue gets a folder of its own."""
    model = with_lora(load_base())

    def fail(view):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("peftstate._saving.capture_sections", fail)
    folders = set()
    for _ in range(2):
        with pytest.raises(errors.SaveError) as caught:
            model.save_pretrained(tmp_path / "adapter")
        folders.add(caught.value.rescued)
    assert folders == {str(tmp_path / f"adapter.rescued-{number}") for number in (0, 1)}


def test_a_full_disk_is_a_save_error(load_base, with_lora, monkeypatch, tmp_path):
    """An error of the file system is a `SaveError`, and the old generation loads."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)

    def fail(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftstate._saving.write_file", fail)
    with pytest.raises(errors.SaveError, match="No space left on device"):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert peftstate.verify(model, tmp_path).ok


def test_a_save_that_cannot_be_tidied_up_is_still_a_save(
    load_base, with_lora, monkeypatch, tmp_path
):
    """If files cannot be moved after the commit, a warning says so and the new state loads."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    model.generation_config.max_new_tokens = 11

    def fail(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("peftstate._storage._move", fail)
    with pytest.warns(errors.UnfinishedSaveWarning, match="the next save moves them"):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert peftstate.verify(model, tmp_path).ok
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert loaded.generation_config.max_new_tokens == 11


def test_names_of_a_compiled_model_are_refused(load_base, with_lora, tmp_path):
    """Keys that PEFT would never find again raise, with the remedy."""
    model = with_lora(load_base())
    state = {
        name.replace("base_model.model.model", "base_model.model._orig_mod.model"): tensor
        for name, tensor in model.state_dict().items()
    }
    with pytest.raises(errors.SaveError, match=r"without what torch\.compile or FSDP"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_model_that_was_wrapped_twice_is_refused(load_base, with_lora, tmp_path):
    """Names with two wrappers in them raise, with the remedy."""
    model = with_lora(with_lora(load_base()))
    with pytest.raises(errors.SaveError, match="wrapped by get_peft_model twice"):
        model.save_pretrained(tmp_path)


def test_an_adapter_in_pieces_is_refused(load_base, with_lora, tmp_path):
    """Empty tensors, as ZeRO-3 leaves them, raise, with the remedy."""
    model = with_lora(load_base())
    state = {
        name: torch.empty(0) if "lora_" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    with pytest.raises(errors.SaveError, match=r"is empty: DeepSpeed ZeRO-3|buffer length \(0\)"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a_stale_weights_file_is_removed(load_base, with_lora, tmp_path):
    """After a save as .bin no old .safetensors is left, which PEFT would prefer."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 1
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert peftstate.verify(model, tmp_path).ok
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert peftstate.verify(loaded, tmp_path).ok


def test_the_model_card_that_is_there_is_kept(load_base, with_lora, tmp_path):
    """PEFT adds to the README in the folder, it does not replace it."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text() + "\nMy own words.\n")
    model.save_pretrained(tmp_path)
    assert "My own words." in readme.read_text()


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_adapter_is_described_as_written(load_base, with_lora, logits, tmp_path):
    """PEFT doubles `r` when it converts PiSSA, for a base model as its checkpoint gives it."""
    model = with_lora(load_base(), init_lora_weights="pissa").eval()
    model.save_pretrained(tmp_path / "initial")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.01
    expected = logits(model)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    assert type(model) is peftstate.PeftModelForCausalLM
    assert list(model.peft_config) == ["default"]
    sections = peftstate.read_manifest(tmp_path / "converted").sections
    assert sections["adapters"].adapters["default"].config["r"] == 8
    assert sections["extra_tensors"].base == {}
    assert sections["base_model"].changed == ()
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / "converted")
    torch.testing.assert_close(logits(loaded), expected)


def test_what_is_trained_outside_the_adapter_is_kept(load_base, with_lora, logits, tmp_path):
    """An unfrozen norm that changed goes to the sidecar and comes back, over and over."""
    model = with_lora(load_base())
    norm = model.get_base_model().model.norm.weight
    norm.requires_grad_(requires_grad=True)
    norm.data += 0.5
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        extra = peftstate.read_manifest(tmp_path / str(number)).sections["extra_tensors"]
        assert list(extra.base) == ["model.norm.weight"]
        loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / str(number))
        assert torch.equal(logits(loaded.eval()), logits(model.eval()))
        model = loaded


def test_tied_weights_that_were_trained_are_kept_once(load_base, tied_lm, with_lora, tmp_path):
    """As when the embeddings were unfrozen, or cast to a dtype that rounds; they stay tied."""
    model = with_lora(load_base("bf16", tied_lm))
    model.get_base_model().lm_head.weight.data += 0.5
    model.save_pretrained(tmp_path)
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    extra = peftstate.read_manifest(tmp_path).sections["extra_tensors"].base
    assert {extra[name].tensor for name in names} == {"base.lm_head.weight"}
    base = peftstate.PeftModel.from_pretrained(load_base("bf16", tied_lm), tmp_path)
    base = base.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(base.lm_head.weight, model.get_base_model().lm_head.weight)


def test_weights_that_share_memory_are_kept_apart(load_base, with_lora, tmp_path):
    """Safetensors writes no two tensors of one memory; a model that is loaded has two of them."""
    model = with_lora(load_base())
    first, second = (layer.input_layernorm.weight for layer in model.get_base_model().model.layers)
    first.data += 0.5
    second.data = first.data
    model.save_pretrained(tmp_path)
    base = peftstate.PeftModel.from_pretrained(load_base(), tmp_path).get_base_model()
    loaded = [layer.input_layernorm.weight for layer in base.model.layers]
    assert all(torch.equal(weight, first) for weight in loaded)
    assert loaded[0].data_ptr() != loaded[1].data_ptr()


def test_changes_that_the_checkpoint_s_dtype_would_round_away_are_kept(
    load_base, with_lora, tmp_path
):
    """As those of norms that were cast to fp32, and trained at a low rate."""
    model = with_lora(load_base("bf16"))
    weight = model.get_base_model().model.norm.weight
    weight.data = weight.data.float() + 1e-6
    assert torch.equal(weight.bfloat16(), load_base("bf16").model.norm.weight)
    model.save_pretrained(tmp_path)
    base = peftstate.PeftModel.from_pretrained(load_base("bf16"), tmp_path).get_base_model()
    assert torch.equal(base.model.norm.weight, weight)


def test_weights_that_do_not_lie_in_order_are_kept(load_base, with_lora, tmp_path):
    """As transposed ones, those of BOFT's merges, and of convolutions in ``channels_last``."""
    model = with_lora(load_base())
    weight = model.get_base_model().model.layers[0].self_attn.o_proj.weight
    weight.data = (2 * weight.data).t().contiguous().t()
    assert not weight.is_contiguous()
    model.save_pretrained(tmp_path)
    assert not weight.is_contiguous()
    base = peftstate.PeftModel.from_pretrained(load_base(), tmp_path).get_base_model()
    assert torch.equal(base.model.layers[0].self_attn.o_proj.weight, weight)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT's, of those it dropped
def test_tensors_lost_to_another_adapters_name_are_kept(load_base, with_lora, logits, tmp_path):
    """PEFT drops tensors of an adapter if another one bears a module's name; they come back."""
    model = with_lora(load_base())
    model.add_adapter("mlp", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    assert peftstate.verify(loaded, tmp_path).of("adapters", "extra_tensors").ok


@pytest.mark.parametrize("name", ["a/b", "con"])
def test_an_adapter_whose_folder_no_load_would_take_is_rescued(
    load_base, with_lora, tmp_path, name
):
    """PEFT names a folder after the adapter; a name that a manifest may not give is refused."""
    model = with_lora(load_base())
    model.add_adapter(name, model.peft_config["default"])
    told = f"cannot be saved: '{name}/adapter_config.json'"
    with pytest.raises(errors.SaveError, match=told) as caught:
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert (Path(caught.value.rescued) / name / "adapter_model.safetensors").is_file()
