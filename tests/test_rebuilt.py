"""What a base model's config was edited to: rebuilt by the auto classes, or refused, or restored.

The config of a base model is in no file of the adapter; who edits it before the training (another
RoPE, a softcap) gets another model from its checkpoint (peft#1916).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import peft
import pytest
import torch
import transformers

import peftstate
from peftstate.errors import BaseModelMismatchError
from peftstate.sections._model_config import (
    BUILT_CONFIG,
    RESTORED_CONFIG,
    config_edits,
    config_fields,
)
from tests._tokenizers import make_tokenizer

IDS = torch.arange(4, 16).reshape(2, 6)


def _rope(**fields: Any) -> dict[str, Any]:
    """The settings of a rotary embedding, under the name that transformers has for them."""
    if hasattr(transformers.LlamaConfig(), "rope_parameters"):
        return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", **fields}}
    theta = fields.pop("rope_theta", None)
    return {"rope_theta": theta} if theta else {"rope_scaling": fields}


@attrs.frozen
class Edit:
    """A config that was edited before a training.

    Attributes:
        model: Which checkpoint, the name of a fixture.
        fields: What `from_pretrained` was given.
    """

    model: str
    fields: dict[str, Any]


EDITS = {
    "RoPE's base": Edit("causal_lm", _rope(rope_theta=500.0)),
    "RoPE scaled": Edit("causal_lm", _rope(rope_type="linear", factor=2.0)),
    "RoPE as in YaRN": Edit(
        "causal_lm",
        _rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=64),
    ),
    "activation": Edit("causal_lm", {"hidden_act": "gelu"}),
    "epsilon": Edit("causal_lm", {"rms_norm_eps": 0.1}),
    "sliding window": Edit("gemma2", {"sliding_window": 2}),
    "softcap of the logits": Edit("gemma2", {"final_logit_softcapping": 0.5}),
    "softcap of attention": Edit("gemma2", {"attn_logit_softcapping": 0.5}),
    "no softcap": Edit("gemma2", {"final_logit_softcapping": None}),
    "scale of attention": Edit("gemma2", {"query_pre_attn_scalar": 64}),
}
"""Edits that change what a model computes."""


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """The folder of a tiny Gemma 2, eager since only that has softcaps in all versions."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    folder = tmp_path_factory.mktemp("gemma2")
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(request):
    """The folder of the checkpoint of a case: `checkpoint(edit)`."""
    return lambda edit: request.getfixturevalue(edit.model)


def load(path: Path, **fields: Any) -> Any:
    """A base model from its checkpoint, its config edited."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **fields
    )


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_changes_the_model_is_rebuilt_or_refused(
    checkpoint, with_lora, logits, tmp_path, name
):
    """The auto class builds the base as it was; a base from the checkpoint alone is another one."""
    path = checkpoint(EDITS[name])
    model = with_lora(load(path, **EDITS[name].fields)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)

    loaded = peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    for field, value in EDITS[name].fields.items():
        found = getattr(loaded.config, field)
        assert found == value or found.items() >= value.items()

    plain = load(path)
    unlike = with_lora(load(path)).eval()
    assert not torch.equal(logits(unlike), expected)  # so that the edit matters at all
    with pytest.raises(BaseModelMismatchError) as caught:
        peftstate.PeftModel.from_pretrained(plain, tmp_path)
    fields = {mismatch.field.split(".")[1] for mismatch in caught.value.mismatches}
    assert EDITS[name].fields.keys() <= fields


def test_the_caller_wins_and_is_verified(causal_lm, with_lora, tmp_path):
    """What is passed for the base is used, and compared with what was saved."""
    with_lora(load(causal_lm, hidden_act="gelu")).eval().save_pretrained(tmp_path)
    with pytest.raises(BaseModelMismatchError, match=r"config\.hidden_act: saved 'gelu'"):
        peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path, hidden_act="relu")


@pytest.mark.parametrize("passes_labels", [False, True])
def test_labels_are_rebuilt(causal_lm, with_lora, logits, tmp_path, passes_labels):
    """The head has as many outputs as the saved one; nobody need say how many."""
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    auto = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(
        causal_lm,
        dtype=torch.float32,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
        problem_type="multi_label_classification",
    )
    model = with_lora(base, task_type="SEQ_CLS").eval()
    model.save_pretrained(tmp_path)
    loaded = peftstate.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path, **({"num_labels": 3} if passes_labels else {})
    )
    assert loaded.config.id2label == labels
    assert loaded.config.problem_type == "multi_label_classification"
    assert torch.equal(logits(loaded), logits(model))


def test_ids_are_restored_either_way(causal_lm, with_lora, tmp_path):
    """Special ids, which trainers set on a live model."""
    base = load(causal_lm)
    base.config.pad_token_id, base.config.eos_token_id = 9, [2, 8]
    with_lora(base).eval().save_pretrained(tmp_path)
    for loaded in (
        peftstate.PeftModel.from_pretrained(load(causal_lm), tmp_path),
        peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert (loaded.config.pad_token_id, loaded.config.eos_token_id) == (9, [2, 8])


@pytest.mark.parametrize("pad", [2, 64])
def test_a_padding_set_on_a_live_model_builds_no_embedding(causal_lm, with_lora, tmp_path, pad):
    """It may be a token that was added; and the row of one that is trained goes on being so."""
    base = load(causal_lm)
    base.resize_token_embeddings(max(64, pad + 1), mean_resizing=False)
    base.config.pad_token_id = pad
    model = with_lora(base, modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path, is_trainable=True)
    assert loaded.config.pad_token_id == pad
    gradients = []
    for each in (model.eval(), loaded.eval()):
        ids = torch.tensor([[5, pad, 6]])
        each(input_ids=ids, labels=ids).loss.backward()
        gradients.append(each.get_input_embeddings().modules_to_save["default"].weight.grad)
    assert gradients[0][pad].any()
    assert torch.equal(*gradients)


def test_the_config_of_a_part_is_rebuilt(tmp_path):
    """Of a model that is made of models; PEFT finds its class by the name in the adapter's file."""
    text = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")

    def base(**fields: Any) -> Any:
        return transformers.LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "base", dtype=torch.float32, **fields
        )

    lora = peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    edited = base(text_config={"hidden_act": "gelu", "rms_norm_eps": 0.1})
    model = peftstate.get_peft_model(edited, lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        loaded = peftstate.AutoPeftModel.from_pretrained(tmp_path / "adapter")
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
    assert loaded.config.text_config.hidden_act == "gelu"
    with pytest.raises(BaseModelMismatchError, match=r"config\.text_config\.hidden_act"):
        peftstate.PeftModel.from_pretrained(base(), tmp_path / "adapter")


# Closed tables


@pytest.mark.parametrize(
    "name",
    ["auto_map", "_attn_implementation", "quantization_config", "architectures", "vocab_size"],
)
def test_no_other_field_is_handed_on(name):
    """Fields that choose code or sizes are none of a manifest's business."""
    config = transformers.LlamaConfig()
    config.auto_map = {"AutoModel": "modeling.Ours"}
    saved = config_fields(config) | {name: {"AutoModel": "evil--modeling.Evil"}}
    saved["hidden_act"] = "gelu"
    assert config_edits(saved, config) == {"hidden_act": "gelu"}
    assert name not in BUILT_CONFIG


@pytest.mark.parametrize("value", [1, True, {"class": "x"}, ["gelu"]])
def test_values_of_another_type_are_not_handed_on(value):
    """Building a model would choke on them; the comparison names the field instead."""
    assert config_edits({"hidden_act": value}, transformers.LlamaConfig()) == {}


def test_fields_that_one_version_only_has_are_not_handed_on():
    """An unknown one would reach the model's constructor."""
    assert config_edits({"sliding_window": 5}, transformers.GPT2Config()) == {}


def test_what_is_restored_on_a_live_model_is_built_as_well():
    """So that a head has the labels from the beginning."""
    assert RESTORED_CONFIG <= BUILT_CONFIG


# Embeddings


@pytest.fixture
def long_tokenizer():
    """A tokenizer with more tokens than the base model has embeddings."""
    tokenizer = make_tokenizer(size=300)
    assert len(tokenizer) > 64
    return tokenizer


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_longer_tokenizer_beside_it_changes_no_sizes(  # noqa: PLR0917
    load_base, with_lora, logits, tmp_path, long_tokenizer, task_type, kind
):
    """PEFT's auto classes add random embeddings for it; the saved model had none."""
    model = with_lora(load_base(kind), task_type=task_type).eval()
    model.save_pretrained(tmp_path, tokenizer=long_tokenizer)
    auto = peftstate.AutoPeftModelForCausalLM if task_type else peftstate.AutoPeftModel
    loaded = auto.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape[0] == 64
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_that_were_resized_for_it_come_back(
    load_base, with_lora, tmp_path, long_tokenizer
):
    """The saved size is in the manifest, the rows are with the adapter."""
    base = load_base()
    base.resize_token_embeddings(len(long_tokenizer), mean_resizing=False)
    model = with_lora(base).eval()
    model.save_pretrained(tmp_path, tokenizer=long_tokenizer)
    loaded = peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 299, 70]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_subfolder_is_the_adapters_and_not_the_bases(load_base, with_lora, logits, tmp_path):
    """PEFT looks for the base model's files in a sub-folder of that name, too."""
    model = with_lora(load_base()).eval()
    model.save_pretrained(tmp_path / "run" / "last")
    loaded = peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run", subfolder="last")
    assert torch.equal(logits(loaded), logits(model))
