"""Tests of `peftstate.adopt`: adapters that were made without peftstate."""

from __future__ import annotations

import json
import random
import shutil

import jsonschema
import peft
import pytest
import safetensors.torch
import torch
import transformers

import peftstate
from peftstate import _adopting, _saving, _schema
from peftstate.errors import (
    AdapterLoadError,
    AdapterNotFoundError,
    BaseModelMismatchError,
    ManifestExistsError,
    QuantizationMismatchError,
)

UNKNOWN = ("training", "generation", "runtime", "rng")
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


def nf4():
    """How `load_base("nf4")` loads a base model."""
    config = transformers.BitsAndBytesConfig(**NF4)
    return {"quantization_config": config, "dtype": torch.bfloat16}


def save_plain(base, folder, config=None, dtype=None, **fields):
    """An adapter that plain PEFT saves, its weights in some dtype."""
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **fields}
    config = config or peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(base, config)
    if dtype is not None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def contents(folder):
    """The bytes of the files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def plain(load_base, tmp_path):
    """The folder of an adapter in bfloat16, that plain PEFT saved."""
    return save_plain(load_base("bf16"), tmp_path / "plain", dtype=torch.bfloat16)


def test_the_adapters_own_files_stay(plain):
    """Two files are added, and nothing of the others is written anew."""
    before = contents(plain)
    inodes = {path.name: path.stat().st_ino for path in plain.iterdir()}
    peftstate.adopt(plain, **nf4())
    after = contents(plain)
    assert after.keys() - before.keys() == {"peftstate.json", "peftstate.tensors"}
    assert {name: after[name] for name in before} == before
    assert {name: (plain / name).stat().st_ino for name in before} == inodes
    assert peftstate.verify_files(plain).ok


def test_a_load_restores_how_the_base_model_was_stated(plain, logits):
    """The auto class quantizes as stated, and the adapter comes back in its dtype on disk."""
    peftstate.adopt(plain, prediction_probe=True, **nf4())
    model = peftstate.AutoPeftModelForCausalLM.from_pretrained(plain)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.weight.quant_type == "nf4"
    on_disk = safetensors.torch.load_file(plain / "adapter_model.safetensors")
    found = peft.get_peft_model_state_dict(model)
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(
        on_disk, torch.bfloat16
    )
    assert all(torch.equal(found[name], on_disk[name]) for name in on_disk)
    assert not model.training
    assert peftstate.verify(model, plain).ok
    again = peftstate.AutoPeftModelForCausalLM.from_pretrained(plain)
    assert torch.equal(logits(model), logits(again))


def test_a_given_base_model_is_verified(plain, load_base):
    """One that is quantized otherwise, or has other weights, is refused."""
    peftstate.adopt(plain, **nf4())
    peftstate.PeftModel.from_pretrained(load_base("nf4"), plain)
    with pytest.raises(QuantizationMismatchError):
        peftstate.PeftModel.from_pretrained(load_base("bf16"), plain)
    other = load_base("nf4")
    other.model.norm.weight.data[0] += 1
    with pytest.raises(BaseModelMismatchError, match=r"model\.norm\.weight"):
        peftstate.PeftModel.from_pretrained(other, plain)


def test_what_nobody_knows_is_not_made_up(plain, load_base):
    """These sections say nothing, a load leaves their state alone, and no comparison has them."""
    manifest = peftstate.adopt(plain, **nf4())
    assert manifest.unknown == UNKNOWN
    assert peftstate.read_manifest(plain).unknown == UNKNOWN
    jsonschema.validate(json.loads(manifest.to_json()), _schema.manifest_schema())

    base = load_base("nf4")
    base.generation_config.temperature = 0.3
    random.seed(5)
    expected = random.Random(5).random()
    model = peftstate.PeftModel.from_pretrained(base, plain)
    assert random.random() == expected
    assert model.generation_config.temperature == 0.3
    assert not set(UNKNOWN) & set(peftstate.verify(model, plain).sections)
    model.train()
    assert peftstate.verify(model, plain).ok


def test_a_training_goes_on_from_it(plain, load_base):
    """With `is_trainable=True` it is as PEFT loads an adapter to train."""
    peftstate.adopt(plain, **nf4())
    model = peftstate.PeftModel.from_pretrained(load_base("nf4"), plain, is_trainable=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert model.training


def test_what_is_saved_afterwards_is_known(plain, load_base, tmp_path):
    """A save of the loaded model records everything, as of any other."""
    peftstate.adopt(plain, **nf4())
    model = peftstate.PeftModel.from_pretrained(load_base("nf4"), plain)
    model.save_pretrained(tmp_path / "saved")
    assert peftstate.read_manifest(tmp_path / "saved").unknown == ()


def test_there_are_no_generators_to_be_reproducible_with(plain, load_base):
    """A seed has to be passed."""
    peftstate.adopt(plain, **nf4())
    model = peftstate.PeftModel.from_pretrained(load_base("nf4"), plain)
    text = (
        r"^no random state was saved with this model, which was adopted; pass a seed: "
        r"peftstate\.reproducible\(model, seed=0\)$"
    )
    with pytest.raises(ValueError, match=text), peftstate.reproducible(model):
        pass
    with peftstate.reproducible(model, seed=0):
        pass


def test_adopting_draws_no_random_number(plain):
    """The generators stand where they stood."""
    before = torch.get_rng_state()
    peftstate.adopt(plain, **nf4())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_manifest_that_is_there_is_not_replaced(plain):
    """What was recorded may be more than a plain load tells."""
    peftstate.adopt(plain, **nf4())
    before = contents(plain)
    with pytest.raises(ManifestExistsError) as caught:
        peftstate.adopt(plain)
    assert str(caught.value) == (
        f"{plain / 'peftstate.json'}: there is a peftstate manifest already, so there is nothing "
        "to adopt. Load the adapter with peftstate; or, to describe it anew by a plain load, "
        "remove that file first."
    )
    assert isinstance(caught.value, FileExistsError)
    assert contents(plain) == before


def test_another_place_of_the_base_model(plain, causal_lm, load_base, tmp_path):
    """The base model may lie elsewhere than where the adapter's config says."""
    moved = shutil.copytree(causal_lm, tmp_path / "moved")
    config = json.loads((plain / "adapter_config.json").read_bytes())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (plain / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterLoadError, match=r"is not to be had .*; pass base= to say where"):
        peftstate.adopt(plain)
    manifest = peftstate.adopt(plain, base=moved, dtype=torch.bfloat16)
    assert manifest.sections["base_model"].name == "moved"
    peftstate.PeftModel.from_pretrained(load_base("bf16"), plain)


def test_an_adapter_of_another_base_model(plain):
    """Weights that fit nowhere are an error, and nothing is written."""
    before = contents(plain)
    weights = plain / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    renamed = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, weights)
    with pytest.raises(
        AdapterLoadError,
        match=r"its file lacks weights that the model takes, such "
        r"as base_model\.model\.model\.layers\.1\.self_attn\.q_proj\.lora_A\.weight; PEFT would "
        r"draw random numbers for them$",
    ):
        peftstate.adopt(plain)
    copies = {name: tensor.clone() for name, tensor in renamed.items()}
    safetensors.torch.save_file(tensors | copies, weights)
    with pytest.raises(
        AdapterLoadError,
        match=r"^adapters: 2 of 6 \(base_model\.model\.model\."
        r"layers\.7\.self_attn\.q_proj\.lora_A\.weight, for one\) of its weights have no place in "
        r"the model; the base model is not the one that it was trained on$",
    ):
        peftstate.adopt(plain)
    assert contents(plain).keys() == before.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_base_model_of_other_sizes(plain, tmp_path):
    """What PEFT cannot load is an error of ours, whose text is PEFT's."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    with pytest.raises(AdapterLoadError, match=r"(?s)PEFT cannot load it onto .*size mismatch"):
        peftstate.adopt(plain, base=tmp_path / "small")


def test_weights_that_no_file_has(classifier, tmp_path):
    """A head that was trained by hand, and that plain PEFT did not save, cannot be adopted."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    config.task_type = "SEQ_CLS"
    save_plain(base, tmp_path / "plain", config=config)
    with pytest.raises(
        AdapterLoadError,
        match=r"^adapters: the loaded model has weights that are "
        r"neither in its files nor in the base model's, such as .*: they were trained and not "
        r"saved, or are computed anew by each load\. Only the model that was trained has them; "
        r"save that with peftstate$",
    ):
        peftstate.adopt(tmp_path / "plain")
    assert not (tmp_path / "plain" / "peftstate.json").exists()


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter(plain, missing):
    """The error says what is missing."""
    (plain / missing).unlink()
    with pytest.raises(AdapterLoadError) as caught:
        peftstate.adopt(plain)
    expected = f"adapters: {plain} has no {missing}, so there is no adapter to adopt"
    assert str(caught.value) == expected


def test_no_folder():
    """A repo has to be downloaded first, since its files are not ours to add to."""
    with pytest.raises(AdapterNotFoundError) as caught:
        peftstate.adopt("org/adapter")
    assert str(caught.value) == (
        "org/adapter: there is no such folder; of a repo on the Hub, download a copy of your own "
        "first."
    )


def test_files_that_are_replaced_meanwhile(plain, monkeypatch):
    """What was loaded is what is recorded, or nothing is."""
    write = _saving.write_state

    def replaced(*arguments, **keywords):
        weights = plain / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(weights)
        safetensors.torch.save_file({name: t + 1 for name, t in tensors.items()}, weights)
        return write(*arguments, **keywords)

    monkeypatch.setattr(_adopting, "write_state", replaced)
    with pytest.raises(AdapterLoadError, match="its files were replaced while it was adopted"):
        peftstate.adopt(plain)
    assert not (plain / "peftstate.json").exists()


TUNERS = {
    "lora in fp32": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "embeddings": peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # by PEFT
@pytest.mark.parametrize("tuner", TUNERS)
def test_other_adapters(tuner, load_base, logits, tmp_path):
    """Each loads afterwards as plain PEFT loads it, verified."""
    folder = save_plain(load_base(), tmp_path / "plain", config=TUNERS[tuner])
    peftstate.adopt(folder, dtype=torch.float32)
    model = peftstate.AutoPeftModelForCausalLM.from_pretrained(folder)
    expected = peft.PeftModel.from_pretrained(load_base(), folder)
    assert torch.equal(logits(model), logits(expected))
    assert peftstate.verify(model, folder).ok
