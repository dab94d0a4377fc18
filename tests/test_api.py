"""Capture, verify and restore on a live model."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import LoraConfig

import peftstate
from peftstate import errors

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


@pytest.fixture
def model(load_base, with_lora):
    """A LoRA model in train mode."""
    return with_lora(load_base("bf16")).train()


def test_capture_gives_what_a_save_writes(model, tmp_path):
    """A captured manifest differs in nothing from the saved one, and names no files."""
    captured = peftstate.capture(model)
    model.save_pretrained(tmp_path)
    assert captured.files == {}
    assert peftstate.diff(captured, peftstate.read_manifest(tmp_path)).ok


def test_verify_reports_every_difference_and_raises_on_request(model, tmp_path):
    """Differences are in the report, by section and field; nothing is raised, nothing changed."""
    model.save_pretrained(tmp_path)
    assert peftstate.verify(model, tmp_path).ok
    model.eval()
    model.generation_config.temperature = 0.5
    torch.rand(1)
    report = peftstate.verify(model, tmp_path)
    assert {mismatch.section for mismatch in report.mismatches} == {"training", "generation", "rng"}
    assert "generation.config.temperature: saved " in str(report)
    with pytest.raises(errors.TrainingStateMismatchError) as caught:
        report.raise_for_mismatch()
    assert caught.value.report is report
    assert not model.training


def test_verify_accepts_another_name_for_the_only_adapter(load_base, with_lora, tmp_path):
    """A model whose only adapter has another name than the saved one is compared all the same."""
    with_lora(load_base()).save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, adapter_name="mine")
    assert peftstate.verify(loaded, tmp_path).ok


def test_verify_reports_an_adapter_that_is_not_there(load_base, with_lora, tmp_path):
    """An adapter of the manifest that the model lacks is a mismatch, not an exception."""
    model = with_lora(load_base())
    model.add_adapter("ref", LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    model.delete_adapter("ref")
    report = peftstate.verify(model, tmp_path)
    assert "adapters.ref" in [mismatch.field for mismatch in report.of("adapters").mismatches]


def test_restore_brings_a_live_model_back(model, logits, tmp_path):
    """Weights, flags, generation config and generators are as they were saved."""
    model.save_pretrained(tmp_path)
    temperature = model.generation_config.temperature
    expected_number, expected = float(torch.rand(1)), logits(model.eval())
    model.generation_config.temperature = 0.5
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 1
    report = peftstate.restore(model, tmp_path)
    assert report.ok
    assert float(torch.rand(1)) == expected_number
    assert model.training
    assert model.generation_config.temperature == temperature
    assert torch.equal(logits(model.eval()), expected)


def test_restore_that_fails_changes_nothing(model, load_base, with_lora, logits, tmp_path):
    """A model on another base raises, and is left as it was."""
    model.save_pretrained(tmp_path)
    base = load_base("bf16")
    base.lm_head.weight.data += 1
    other = with_lora(base).eval()
    expected, generator = logits(other), torch.get_rng_state()
    with pytest.raises(errors.BaseModelMismatchError):
        peftstate.restore(other, tmp_path)
    assert torch.equal(logits(other), expected)
    assert torch.equal(torch.get_rng_state(), generator)


def test_functions_work_on_pefts_own_models(load_base, tmp_path):
    """Capture and verify need no attached model."""
    plain = peft.get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM"))
    before = peftstate.capture(plain)
    peftstate.attach(plain).save_pretrained(tmp_path)
    assert peftstate.verify(plain, tmp_path).ok
    assert peftstate.diff(before, peftstate.read_manifest(tmp_path)).ok


def test_a_sampled_fingerprint_tells_another_model(load_base, with_lora, tmp_path):
    """A sampled or absent fingerprint is compared as such; full is the default."""
    model = with_lora(load_base())
    for level in ("full", "sampled", "off"):
        model.save_pretrained(tmp_path / level, fingerprint=level)
        manifest = peftstate.read_manifest(tmp_path / level)
        assert manifest.sections["base_model"].fingerprint == level
        assert peftstate.verify(model, tmp_path / level).ok
        loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path / level)
        loaded.save_pretrained(tmp_path / "again")
        assert not peftstate.read_manifest(tmp_path / "again").sections["extra_tensors"].base
    with pytest.raises(ValueError, match="fingerprint='half' is none of"):
        model.save_pretrained(tmp_path / "half", fingerprint="half")
