"""The auto classes rebuild the base model from the manifest."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from peft import prepare_model_for_kbit_training

import peftstate
from peftstate import errors

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")

CLASSES = [name for name in peftstate.__all__ if name.startswith("AutoPeftModel")]


@pytest.mark.parametrize("name", CLASSES)
def test_auto_classes_are_pefts_by_name_and_by_inheritance(name):
    """Each class bears the name of PEFT's, is a subclass of it, and makes our model class."""
    ours, theirs = getattr(peftstate, name), getattr(peft, name)
    assert ours.__name__ == theirs.__name__
    assert issubclass(ours, theirs)
    assert ours._target_class is theirs._target_class
    assert ours._target_peft_class.__name__ == theirs._target_peft_class.__name__
    assert issubclass(ours._target_peft_class, peftstate.PeftModel)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8"])
def test_the_base_is_rebuilt_and_the_logits_are_equal(load_base, with_lora, logits, tmp_path, kind):
    """Quantization, dtypes and attention come from the manifest; nothing need be passed."""
    base = load_base(kind, attn_implementation="eager")
    if kind == "nf4":
        base = prepare_model_for_kbit_training(base)
    model = with_lora(base)
    model.save_pretrained(tmp_path)
    loaded = peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is peftstate.PeftModelForCausalLM
    assert loaded.config._attn_implementation == "eager"
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_a_sequence_classifier_comes_back_with_its_head(
    load_base, with_lora, logits, causal_lm, tmp_path
):
    """A head that was initialised at random is the saved one after the reload."""
    base = load_base(auto_class="AutoModelForSequenceClassification", path=causal_lm, num_labels=5)
    model = with_lora(base, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    loaded = peftstate.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5
    )
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_what_the_caller_passes_wins_and_is_verified(load_base, with_lora, tmp_path):
    """A quantization config that is passed is used, and raises if it is not the saved one."""
    with_lora(load_base("nf4")).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    with pytest.raises(errors.QuantizationMismatchError) as caught:
        peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "default.quant_type: saved 'nf4', found 'fp4'" in str(caught.value)


def test_the_arguments_for_verification_reach_the_load(load_base, with_lora, tmp_path):
    """`on_mismatch`, `require_manifest`, `adapters` and `is_trainable` work as in `PeftModel`."""
    with_lora(load_base()).save_pretrained(tmp_path)
    load = peftstate.AutoPeftModelForCausalLM.from_pretrained
    assert not load(tmp_path, is_trainable=False).training
    assert not load(tmp_path, on_mismatch={"training": "ignore"}, adapters=()).training
    (tmp_path / "peftstate.json").unlink()
    with pytest.raises(errors.ManifestNotFoundError):
        load(tmp_path, require_manifest=True)
    with pytest.warns(errors.MissingManifestWarning):
        assert type(load(tmp_path)) is peftstate.PeftModelForCausalLM


def test_base_model_kwargs_rebuild_the_base(load_base, with_lora, causal_lm, logits, tmp_path):
    """What `base_model_kwargs` gives makes `from_pretrained` load the base that was saved."""
    model = with_lora(load_base("nf4"))
    model.save_pretrained(tmp_path)
    kwargs = peftstate.base_model_kwargs(tmp_path)
    assert sorted(kwargs) == [
        "attn_implementation",
        "dtype",
        "quantization_config",
    ]
    base = transformers.AutoModelForCausalLM.from_pretrained(causal_lm, **kwargs)
    loaded = peftstate.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    assert peftstate.base_model_kwargs(peftstate.read_manifest(tmp_path)).keys() == kwargs.keys()


def test_a_recorded_commit_is_the_revision_of_the_base(load_base, with_lora, tmp_path):
    """The commit that was read off the Hub's cache, or else the revision, is asked for again."""
    import attrs

    with_lora(load_base()).save_pretrained(tmp_path)
    manifest = peftstate.read_manifest(tmp_path)
    for fields, revision in (
        ({"commit": "c0ffee"}, "c0ffee"),
        ({"revision": "v2"}, "v2"),
        ({"commit": "c0ffee", "revision": "v2"}, "c0ffee"),
    ):
        record = attrs.evolve(manifest.sections["base_model"], **fields)
        sections = {**manifest.sections, "base_model": record}
        kwargs = peftstate.base_model_kwargs(attrs.evolve(manifest, sections=sections))
        assert kwargs["revision"] == revision


def test_no_kernel_repository_is_loaded_from_a_manifest(load_base, with_lora, tmp_path):
    """An attention implementation outside the closed table never reaches transformers."""
    import attrs

    with_lora(load_base()).save_pretrained(tmp_path)
    manifest = peftstate.read_manifest(tmp_path)
    record = attrs.evolve(
        manifest.sections["implementation"], attention={"": "evil/kernel"}, experts={"": "x/y"}
    )
    sections = {**manifest.sections, "implementation": record}
    kwargs = peftstate.base_model_kwargs(attrs.evolve(manifest, sections=sections))
    assert "attn_implementation" not in kwargs
    assert "experts_implementation" not in kwargs
    assert "evil" not in json.dumps({key: str(value) for key, value in kwargs.items()})
