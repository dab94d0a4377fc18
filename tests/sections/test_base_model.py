"""Tests of the section `base_model`."""

from __future__ import annotations

import json
from typing import Any

import attrs
import peft
import pytest
import torch
from torch import nn

import peftstate
from peftstate import PeftModel
from peftstate.errors import BaseModelMismatchError, StateMismatchWarning
from peftstate.sections import base_model
from peftstate.sections._model_config import NOT_IN_CONFIG, RESTORED_CONFIG
from peftstate.sections._view import ModelView
from peftstate.sections.base_model import SECTION, BaseModelRecord

NORM = "model.norm.weight"


def capture(model: nn.Module, fingerprint: str = "full") -> BaseModelRecord:
    """The record of a model, through JSON and back."""
    record = base_model.capture(ModelView.of(model, fingerprint=fingerprint))
    return SECTION.decode(json.loads(json.dumps(SECTION.encode(record))))


def differences(record: BaseModelRecord, model: nn.Module) -> list[str]:
    """The fields that a comparison reports."""
    found = base_model.capture_like(ModelView.of(model), record)
    return [mismatch.field for mismatch in SECTION.compare(record, found)]


@pytest.fixture
def saved(load_base, with_lora):
    """Captures the base model of a fresh adapter: `saved(kind, fingerprint)`."""

    def saved(kind: str = "bf16", fingerprint: str = "full") -> BaseModelRecord:
        return capture(with_lora(load_base(kind)), fingerprint)

    return saved


@pytest.fixture
def adapter(tmp_path, load_base, with_lora):
    """The folder of an adapter that was saved on `load_base("bf16")`."""
    with_lora(load_base("bf16")).eval().save_pretrained(tmp_path)
    return tmp_path


# Tensors


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8"])
def test_bare_and_wrapped_models_have_equal_records(kind, load_base, with_lora):
    """What a bare base is compared with is what was captured under an adapter."""
    bare, wrapped = load_base(kind), with_lora(load_base(kind))
    record = capture(wrapped)
    assert record.changed == ()
    # nobody saw the bare one before it could have been trained
    assert attrs.evolve(capture(bare), changed=()) == record
    assert differences(record, bare) == []
    assert differences(record, wrapped) == []


def test_names_are_those_of_the_checkpoint(load_base, with_lora):
    """Names in a message can be looked up in the files of the model."""
    model = load_base("bf16")
    expected = model.state_dict().keys()
    assert capture(with_lora(model)).tensors.keys() == expected


def test_changed_value_names_the_tensor(saved, load_base):
    """The smallest change of a single weight is told."""
    record, base = saved(), load_base("bf16")
    base.model.norm.weight.data.view(torch.uint8)[0] ^= 1
    assert differences(record, base) == [f"tensors[{NORM}].digest"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_changed_quantized_weight_names_the_tensor(kind, saved, load_base):
    """Of quantized weights, too, whether they have run or not."""
    record, base = saved(kind), load_base(kind)
    weight = base.model.layers[1].mlp.up_proj.weight
    weight.data.view(-1).view(torch.uint8)[7] ^= 1
    (field,) = differences(record, base)
    assert field.startswith("tensors[model.layers.1.mlp.up_proj.weight")


def test_missing_and_additional_tensors_are_named(saved, load_base):
    """A model with another set of tensors is another model."""
    record, base = saved(), load_base("bf16")
    base.lm_head = nn.Linear(64, 64, dtype=torch.bfloat16)
    found = differences(record, base)
    assert found == ["tensors[lm_head.bias]", "tensors[lm_head.weight].digest"]


def test_upcast_base_is_the_same(saved, load_base):
    """A base that was loaded in a wider dtype holds the same values."""
    assert differences(saved(), load_base("fp32")) == []


def test_narrowed_base_is_another_one(load_base, with_lora):
    """If the cast lost anything, the digest over the saved dtype tells."""
    model = load_base("fp32")
    model.model.norm.weight.data += 2**-20
    record = capture(with_lora(model))
    model.bfloat16()
    assert differences(record, model) == [f"tensors[{NORM}].digest"]
    unchanged = capture(with_lora(load_base("fp32")))
    assert differences(unchanged, load_base("bf16")) == []


def test_kbit_preparation_changes_no_digest(saved, load_base):
    """Casting all that is not quantized to fp32 loses nothing."""
    record = saved("nf4")
    assert differences(record, peft.prepare_model_for_kbit_training(load_base("nf4"))) == []


def test_buffers_that_no_checkpoint_holds_are_left_out(load_base):
    """The rotary frequencies are the config's, and differ in the last bits between devices."""
    assert not [name for name in capture(load_base("bf16")).tensors if "rotary" in name]


def test_running_statistics_are_part_of_it():
    """BatchNorm's buffers are in checkpoints."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    record = capture(model)
    model(torch.randn(3, 2))
    assert differences(record, model) == [
        f"tensors[1.{name}].digest"
        for name in ("num_batches_tracked", "running_mean", "running_var")
    ]


def test_meta_tensors_are_not_compared(load_base, with_lora):
    """What cannot be read, there or here, is no difference; if it could be, a warning tells."""
    base = load_base("bf16")
    model = with_lora(base)
    complete = capture(model)
    base.lm_head.to("meta")
    record = capture(model)
    assert record.tensors["lm_head.weight"].digest is None
    assert differences(record, load_base("bf16")) == []
    with pytest.warns(StateMismatchWarning, match="1 of 29 tensors"):
        assert differences(complete, model) == []


# Embeddings


def test_tied_embeddings_are_told_from_equal_ones(load_base, tied_lm):
    """Two copies of the same values would come apart in a training."""
    record = capture(load_base("bf16", tied_lm))
    assert record.tied_embeddings
    base = load_base("bf16", tied_lm)
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    assert differences(record, base) == ["tied_embeddings"]
    assert not capture(load_base("bf16")).tied_embeddings


def test_head_with_a_trained_copy_need_not_be_the_same(load_base, with_lora, classifier):
    """transformers makes a fresh head of other random numbers each time."""

    def load() -> Any:
        base = load_base("fp32", classifier, "AutoModelForSequenceClassification")
        nn.init.normal_(base.score.weight)
        return base

    model = with_lora(load(), task_type="SEQ_CLS", modules_to_save=["score"])
    record = capture(model)
    assert record.shadowed == ("score.weight",)
    assert record.tensors["score.weight"].digest is None
    assert differences(record, load()) == []
    other = load()
    other.score = nn.Linear(64, 4, bias=False)
    assert differences(record, other) == ["tensors[score.weight].shape"]


# Fingerprints


def test_sampled_fingerprint_reads_less_and_tells_other_weights(saved, load_base):
    """It is compared as it was made, whatever is asked for then."""
    record = saved("bf16", "sampled")
    base = load_base("bf16")
    assert record.fingerprint == "sampled"
    assert differences(record, base) == []
    base.model.norm.weight.data *= 2
    assert differences(record, base) == [f"tensors[{NORM}].digest"]


def test_fingerprint_that_is_off_leaves_dtype_and_shape(saved, load_base):
    """Values are not looked at, the rest is."""
    record = saved("bf16", "off")
    assert {tensor.digest for tensor in record.tensors.values()} == {None}
    base = load_base("bf16")
    base.model.norm.weight.data *= 2
    assert differences(record, base) == []
    base.model.norm = nn.LayerNorm(32, dtype=torch.bfloat16)
    assert differences(record, base) == ["tensors[model.norm.bias]", f"tensors[{NORM}].shape"]


@pytest.mark.parametrize("fingerprint", ["sampled", "off"])
def test_fingerprint_goes_through_a_save(fingerprint, tmp_path, load_base, with_lora):
    """The manifest says what its digests cover."""
    with_lora(load_base("bf16")).eval().save_pretrained(tmp_path, fingerprint=fingerprint)
    record = peftstate.read_manifest(tmp_path).sections["base_model"]
    assert record.fingerprint == fingerprint
    PeftModel.from_pretrained(load_base("bf16"), tmp_path)


# Config


EDITS = {
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 128,
    "attention_dropout": 0.5,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", EDITS)
def test_edit_that_changes_the_outcome_is_an_error(name, adapter, load_base):
    """What a config says of the computation is compared, and never set on a live model."""
    base = load_base("bf16")
    setattr(base.config, name, EDITS[name])
    with pytest.raises(BaseModelMismatchError) as error:
        PeftModel.from_pretrained(base, adapter)
    assert [mismatch.field for mismatch in error.value.mismatches] == [f"config.{name}"]
    assert getattr(base.config, name) == EDITS[name]


def test_edit_of_the_rotary_embedding_is_an_error(adapter, load_base):
    """Of a nested field, too: peft#1916 asked to save the config because of this one."""
    base = load_base("bf16")
    name = "rope_parameters" if hasattr(base.config, "rope_parameters") else "rope_scaling"
    setattr(base.config, name, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(BaseModelMismatchError, match=rf"base_model\.config\.{name}"):
        PeftModel.from_pretrained(base, adapter)


RESTORABLE = {
    "bos_token_id": 7,
    "decoder_start_token_id": 8,
    "eos_token_id": [2, 9],
    "pad_token_id": 11,
    "pretraining_tp": 2,
    "problem_type": "single_label_classification",
    "sep_token_id": 12,
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
}


@pytest.mark.parametrize("name", sorted(RESTORED_CONFIG))
def test_edit_of_a_trainer_is_restored(name, load_base):
    """Token ids, labels and the like, as trainers and PEFT itself set them on a live model."""
    model, base = load_base("bf16"), load_base("bf16")
    setattr(model.config, name, RESTORABLE[name])
    record = capture(model)
    if name not in capture(base).config:  # a field that this transformers knows only once it is set
        setattr(base.config, name, None)
    assert differences(record, base)
    base_model.restore(record, ModelView(model=base))
    assert differences(record, base) == []
    assert getattr(base.config, name) == RESTORABLE[name]


@pytest.mark.parametrize("name", sorted(NOT_IN_CONFIG))
def test_field_that_is_recorded_elsewhere_is_left_out(name, load_base):
    """A difference in it is reported once, by the section that it belongs to."""
    model = load_base("bf16")
    record = capture(model)
    assert name not in record.config
    if name == "quantization_config":  # transformers 4 takes no `None` for it
        model.config.quantization_config = {"quant_method": "gptq"}
    else:
        setattr(model.config, name, False if name == "use_cache" else None)
    assert differences(record, model) == []


def test_fields_of_another_transformers_are_no_difference(load_base):
    """A field that only one of two versions knows is not compared."""
    base = load_base("bf16")
    record = capture(base)
    older = attrs.evolve(record, config={**record.config, "field_of_old": 1})
    assert differences(older, base) == []
    newer = {key: value for key, value in record.config.items() if key != "rms_norm_eps"}
    assert differences(attrs.evolve(record, config=newer), base) == []


def test_another_class_is_another_model(load_base, causal_lm):
    """The same weights under another head are not what the adapter was trained on."""
    record = capture(load_base("bf16"))
    other = load_base("bf16", causal_lm, "AutoModel")
    assert "model_class" in differences(record, other)


# Where it came from


def test_local_path_is_recorded_by_its_last_component(load_base, causal_lm):
    """Folders are moved about, and their parents are nobody's business."""
    record = capture(load_base("bf16"))
    assert record.name == causal_lm.name
    assert str(causal_lm.parent) not in json.dumps(SECTION.encode(record))
    assert record.commit is None


def test_repo_id_is_recorded_as_it_is(load_base):
    """So that the base model can be loaded by the manifest alone."""
    model = load_base("bf16")
    model.config._name_or_path = "owner/model"
    assert capture(model).name == "owner/model"


def test_commit_is_read_off_the_cache(load_base, tmp_path, monkeypatch):
    """The name of the snapshot's folder is the commit; nothing is asked of the Hub."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--owner--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_base("bf16")
    model.config._name_or_path = "owner/model"
    assert capture(model).commit == commit
    model.config._name_or_path = "owner/other"
    assert capture(model).commit is None


def test_origin_is_no_evidence(load_base):
    """The same tensors under another name, or at another commit, are the same model."""
    base = load_base("bf16")
    record = attrs.evolve(capture(base), name="elsewhere", commit="0" * 40, revision="v1")
    assert differences(record, base) == []


def test_revision_is_what_peft_was_told(load_base):
    """`get_peft_model(…, revision=…)` is where a user says it."""
    config = peft.LoraConfig(target_modules=["q_proj"], revision="v2")
    assert capture(peft.get_peft_model(load_base("bf16"), config)).revision == "v2"


# Loads


def test_other_weights_are_refused_before_the_base_is_touched(adapter, load_base):
    """The error names the tensor, and the caller's model is as it was."""
    base = load_base("bf16")
    base.lm_head.weight.data[3, 5] += 1
    modules = [type(module) for module in base.modules()]
    with pytest.raises(
        BaseModelMismatchError, match=r"tensors\[lm_head\.weight\]\.digest"
    ) as error:
        PeftModel.from_pretrained(base, adapter)
    assert len(error.value.mismatches) == 1
    assert [type(module) for module in base.modules()] == modules


def test_merged_weights_are_put_back_and_compared(tmp_path, load_base, with_lora, logits):
    """Merging rounds: the loaded model has the merged weights, bit for bit."""
    model = with_lora(load_base("bf16")).eval()
    model.merge_adapter()
    expected = logits(model)
    record = capture(model)
    layers = {name.rpartition(".")[0].rpartition(".")[2] for name in record.changed}
    assert layers == {"q_proj", "down_proj"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base("bf16"), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert differences(record, loaded) == []
