"""Each known cause of a changed reload, by its number: restored exactly, or met by a typed error.

The causes: A the adapter is not (wholly) loaded, B the base model is loaded differently, C mode,
randomness and wrappers, D the adapter's numerics, E tokenizer and inputs, F the environment.
"""

from __future__ import annotations

import json
import random
import warnings

import attrs
import numpy as np
import peft
import pytest
import torch
import transformers
from peft import LoraConfig, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file

import peftstate
from peftstate import errors
from tests._tokenizers import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")

NUMBERS = [
    "A1",
    "A2",
    "A3",
    "A4",
    "A5",
    "A6",
    "A7",
    "A8",
    "A9",
    "B1",
    "B2",
    "B3",
    "B4",
    "B5",
    "B6",
    "B7",
    "B8",
    "B9",
    "B10",
    "C1",
    "C2",
    "C3",
    "C4",
    "C5",
    "C6",
    "C7",
    "C8",
    "C9",
    "D1",
    "D2",
    "D3",
    "D4",
    "D5",
    "D6",
    "D7",
    "E1",
    "E2",
    "F1",
    "F2",
    "F3",
    "F4",
    "F5",
]


def test_every_cause_has_a_test():
    """No number is left out."""
    tested = {name.split("_")[1].upper() for name in globals() if name.startswith("test_")}
    assert [number for number in NUMBERS if number not in tested] == []
    assert len(NUMBERS) == 42


@pytest.fixture
def reload(load_base, tmp_path):
    """Saves a model and loads it on a fresh base: `reload(model, kind, **load_base)`."""

    def run(model, kind="fp32", base=None, **keywords):
        model.save_pretrained(tmp_path / "adapter")
        torch.manual_seed(12345)
        return peftstate.PeftModel.from_pretrained(
            load_base(kind, **keywords) if base is None else base, tmp_path / "adapter"
        )

    return run


@pytest.fixture
def equal(logits):
    """Whether two models give the same logits in eval mode, to the last bit."""
    return lambda one, two: torch.equal(logits(one.eval()), logits(two.eval()))


def test_a1_keys_do_not_match(load_base, with_lora, tmp_path):
    """Keys that match nothing, which PEFT passes over, raise."""
    with_lora(load_base()).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({f"_orig_mod.{key}": value for key, value in load_file(weights).items()}, weights)
    with pytest.raises(errors.IntegrityError, match=r"adapter_model\.safetensors"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a2_an_adapter_bears_the_name_of_a_module(load_base, with_lora, reload, equal):
    """Tensors that PEFT drops, because another adapter is called `mlp`, come back."""
    model = with_lora(load_base())
    model.add_adapter("mlp", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    assert equal(reload(model), model)


def test_a3_parameters_trained_outside_the_adapter(load_base, with_lora, reload, equal):
    """A norm that was unfrozen and trained comes back."""
    model = with_lora(load_base())
    norm = model.get_base_model().model.norm.weight.requires_grad_(requires_grad=True)
    norm.data += 0.5
    assert equal(reload(model), model)


def test_a4_a_head_that_was_initialised_at_random(load_base, with_lora, reload, equal):
    """A head that no checkpoint has, and PEFT does not save, comes back."""
    head = {"auto_class": "AutoModelForSequenceClassification", "num_labels": 5}
    model = with_lora(load_base(**head), task_type=None)
    if transformers.__version__ < "5":  # which does not mark what it initialised
        with pytest.raises(errors.BaseModelMismatchError, match=r"tensors\[score\.weight\]"):
            reload(model, **head)
    else:
        assert equal(reload(model, **head), model)


def test_a5_resized_embeddings(load_base, with_lora, tmp_path, logits):
    """New rows come back, also where PEFT cannot know of them: the base's config is unreachable."""
    base = load_base()
    base.resize_token_embeddings(70, mean_resizing=False)
    base.config._name_or_path = base.name_or_path = "nobody/nothing"
    model = with_lora(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file in nobody/nothing")
        model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    new_rows = torch.tensor([[3, 66, 69]])
    assert torch.equal(logits(loaded.eval(), new_rows), logits(model.eval(), new_rows))


def test_a6_tied_weights_come_apart(load_base, tied_lm, with_lora, tmp_path):
    """A base whose embeddings are no longer tied is refused."""
    with_lora(load_base(path=tied_lm)).save_pretrained(tmp_path)
    base = load_base(path=tied_lm)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    with pytest.raises(errors.BaseModelMismatchError, match="tied_embeddings: saved True"):
        peftstate.PeftModel.from_pretrained(base, tmp_path)


def test_a7_shards_that_were_not_gathered(load_base, with_lora, tmp_path):
    """Empty tensors, as ZeRO-3 leaves them, refuse the save."""
    model = with_lora(load_base())
    state = {key: torch.empty(0) for key in model.state_dict()}
    # what the oldest safetensors says of an empty tensor comes before our words
    with pytest.raises(errors.SaveError, match=r"ZeRO-3|buffer length \(0\)"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a8_several_adapters(load_base, with_lora, reload, equal):
    """All adapters come back, and the active one is active."""
    model = with_lora(load_base())
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("b")
    loaded = reload(model)
    assert loaded.active_adapters == ["b"]
    assert equal(loaded, model)


def test_a9_another_weights_file_is_picked(load_base, with_lora, tmp_path):
    """A stale `.bin` in place of the saved file raises instead of being loaded."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    peft.PeftModel.save_pretrained(model, tmp_path / "bin", safe_serialization=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "bin" / "adapter_model.bin").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(errors.IntegrityError, match="found no file"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


def test_b1_the_base_is_quantized_otherwise(load_base, with_lora, tmp_path, equal):
    """A base that is not quantized is refused; the auto class quantizes it as it was."""
    model = with_lora(load_base("nf4"))
    model.save_pretrained(tmp_path)
    with pytest.raises(errors.QuantizationMismatchError):
        peftstate.PeftModel.from_pretrained(load_base("bf16"), tmp_path)
    assert equal(peftstate.AutoPeftModelForCausalLM.from_pretrained(tmp_path), model)


def test_b2_a_checkpoint_overrides_the_config_that_is_passed(
    load_base, with_lora, reload, equal, tmp_path
):
    """What counts are the live layers: a pre-quantized base keeps its own compute dtype."""
    load_base("nf4").save_pretrained(tmp_path / "quantized")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16
    )

    def load():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers says that it ignores the config
            return load_base("bf16", tmp_path / "quantized", quantization_config=config)

    model = with_lora(load())
    loaded = reload(model, base=load())
    assert equal(loaded, model)
    record = peftstate.capture(loaded).sections["quantization"]
    assert record.state.default.compute_dtype == "bfloat16"
    assert record.pre_quantized


def test_b3_kbit_preparation_is_not_repeated(load_base, with_lora, reload, equal):
    """What `prepare_model_for_kbit_training` cast is cast again."""
    model = with_lora(prepare_model_for_kbit_training(load_base("nf4")))
    assert equal(reload(model, "nf4"), model)


def test_b4_the_base_is_loaded_in_another_dtype(load_base, with_lora, reload, equal):
    """A base that was trained in fp32 and is loaded in bf16 comes back in fp32, and reversely."""
    for trained, loaded in (("fp32", "bf16"), ("bf16", "fp32")):
        model = with_lora(load_base(trained))
        assert equal(reload(model, loaded), model)


def test_b5_another_revision_of_the_base(load_base, with_lora, reload):
    """A base with one other weight is refused, and the weight named."""
    base = load_base()
    base.model.norm.weight.data[7] += 1
    with pytest.raises(errors.BaseModelMismatchError, match=r"tensors\[model.norm.weight\]"):
        reload(with_lora(load_base()), base=base)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_b6_initialisations_that_rewrite_the_base(load_base, with_lora, reload, equal, init):
    """The reload is exact under another seed."""
    model = with_lora(load_base(), init_lora_weights=init)
    assert equal(reload(model), model)


def test_b7_the_config_of_the_base_was_edited(load_base, with_lora, reload):
    """Token ids are put back; a field that changes the forward is refused."""
    base = load_base()
    base.config.eos_token_id = 9
    assert reload(with_lora(base)).config.eos_token_id == 9
    with pytest.raises(errors.BaseModelMismatchError, match=r"config\.hidden_act: saved 'silu'"):
        reload(with_lora(load_base()), hidden_act="gelu")


def test_b8_another_attention_implementation(load_base, with_lora, reload, equal):
    """Attention runs in the saved implementation again."""
    model = with_lora(load_base(attn_implementation="eager"))
    loaded = reload(model, attn_implementation="sdpa")
    assert loaded.config._attn_implementation == "eager"
    assert equal(loaded, model)


def test_b9_buffers_that_training_changes(tmp_path):
    """The statistics of BatchNorm come back."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=3
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "base")

    def load():
        return transformers.ResNetForImageClassification.from_pretrained(tmp_path / "base")

    lora = LoraConfig(target_modules=["convolution"], init_lora_weights=False)
    model = peftstate.get_peft_model(load(), lora)
    images = torch.randn(4, 3, 32, 32)
    model.train()(images)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peftstate.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_b10_merged_at_save(load_base, with_lora, reload, equal, kind):
    """A model that was saved merged is merged again, to the same weights."""
    model = with_lora(load_base(kind))
    model.merge_adapter()
    loaded = reload(model, kind)
    assert peftstate.capture(loaded).sections["adapters"].merged == ("default",)
    assert equal(loaded, model)


def test_c1_train_flags_that_are_mixed(load_base, with_lora, reload):
    """An eval base with an adapter in train mode comes back just so."""
    model = with_lora(load_base())
    flags = {name: module.training for name, module in model.named_modules()}
    assert set(flags.values()) == {True, False}
    loaded = reload(model)
    assert {name: module.training for name, module in loaded.named_modules()} == flags


def test_c2_sampling_and_random_numbers(load_base, with_lora, reload):
    """The next numbers of all generators are those that would have come."""
    model = with_lora(load_base())
    model.save_pretrained  # noqa: B018 - the state is taken by the reload below
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = random.random(), np.random.random(), torch.rand(3).tolist()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    reload(model)
    assert (random.random(), np.random.random(), torch.rand(3).tolist()) == expected


def test_c3_the_generation_config(load_base, with_lora, reload):
    """Edits of the session come back."""
    model = with_lora(load_base())
    model.generation_config.update(eos_token_id=[7, 9], max_new_tokens=5)
    assert reload(model).generation_config.to_dict() == model.generation_config.to_dict()


def test_c4_the_autocast_wrapper(load_base, with_lora, reload, equal):
    """accelerate's wrapper, which stays on `forward`, is there again."""
    from accelerate import Accelerator

    model = with_lora(load_base())
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    assert equal(reload(model), model)


def test_c5_gradient_checkpointing_and_use_cache(load_base, with_lora, reload):
    """Both are as they were."""
    model = with_lora(load_base())
    base = model.get_base_model()
    base._set_gradient_checkpointing(enable=True)
    base.config.use_cache = False
    loaded = reload(model).get_base_model()
    assert all(layer.gradient_checkpointing for layer in loaded.model.layers)
    assert loaded.config.use_cache is False


def test_c6_hooks_that_are_left_behind(load_base, with_lora, reload):
    """A hook that cannot be put back is told."""
    model = with_lora(load_base())
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda *_: None)
    with pytest.warns(errors.StateMismatchWarning, match=r"hooks\[model.embed_tokens\]"):
        reload(model)


def test_c7_disabled_adapters_and_scaling(load_base, with_lora, reload, equal):
    """Adapters that are off are off again, and run-time scaling is kept."""
    model = with_lora(load_base())
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3)
    assert equal(reload(model), model)
    model.base_model.disable_adapter_layers()
    assert equal(reload(model), model)


def test_c8_trainable_parameters(load_base, with_lora, reload):
    """The same parameters are trainable."""
    model = with_lora(load_base())
    next(p for n, p in model.named_parameters() if "lora_B" in n).requires_grad_(
        requires_grad=False
    )
    loaded = reload(model)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_c9_another_checkpoint_than_the_best(load_base, with_lora, tmp_path):
    """Weights of another step are told from those that were saved."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data += 1
    report = peftstate.verify(model, tmp_path)
    assert [mismatch.section for mismatch in report.mismatches] == ["adapters"]


def test_d1_the_adapters_dtype(load_base, with_lora, reload, equal):
    """A bf16 adapter, as TRL trains it, is not cast to fp32."""
    model = with_lora(load_base("nf4"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    loaded = reload(model, "nf4")
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert equal(loaded, model)


def test_d2_a_head_that_is_rounded_to_the_dtype_of_the_base(load_base, with_lora, reload, equal):
    """A module to save that was trained in fp32 over a bf16 base comes back in fp32."""
    model = with_lora(load_base("bf16"), modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"]
    head.float().weight.data += 1e-4
    model.get_base_model().model.norm.float()
    assert equal(reload(model, "bf16"), model)


def test_d3_config_fields_that_are_dropped(load_base, with_lora, tmp_path):
    """A field of the config that was lost or edited raises by its name."""
    with_lora(load_base()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["use_rslora"]
    path.write_text(json.dumps(config))
    with pytest.raises(errors.AdapterMismatchError, match=r"config\.use_rslora: saved False"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


def test_d4_frozen_parts_that_come_from_a_seed(load_base, reload, equal, monkeypatch):
    """VeRA's projections are drawn again from their key, and compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of save_projection=False
        config = peft.VeraConfig(
            r=4, target_modules=["q_proj"], save_projection=False, task_type="CAUSAL_LM"
        )
        model = peftstate.get_peft_model(load_base(), config)
        for name, parameter in model.named_parameters():
            if "vera_lambda_b" in name:
                parameter.data += 1
        assert equal(reload(model), model)
        projection = model.base_model.vera_A["default"]
        projection.data += 1  # as another version of torch might draw it
        with pytest.raises(errors.AdapterMismatchError, match="vera_A"):
            reload(model)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("config", [peft.PromptEncoderConfig, peft.PrefixTuningConfig])
def test_d5_prompts_that_are_saved_for_inference_only(load_base, reload, equal, config):
    """The layers that computed a prompt come back, and it can be trained further."""
    fields = {"prefix_projection": True} if config is peft.PrefixTuningConfig else {}
    prompt = config(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, **fields)
    model = peftstate.get_peft_model(load_base(), prompt)
    loaded = reload(model)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert equal(loaded, model)


def test_d6_layers_that_running_them_changes(load_base, with_lora, reload, equal, logits):
    """4-bit layers that a CPU repacked, and biases that were cast, are as they were."""
    model = with_lora(load_base("nf4")).eval()
    logits(model)
    assert equal(reload(model, "nf4"), model)


def test_d7_another_layout_of_experts(load_base, with_lora, tmp_path):
    """Versions of PEFT and transformers are recorded, and a difference is told."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    manifest = peftstate.read_manifest(tmp_path)
    record = manifest.sections["environment"]
    older = attrs.evolve(record, packages={**record.packages, "peft": "0.1.0"})
    sections = {**manifest.sections, "environment": older}
    data = attrs.evolve(manifest, sections=sections).to_json()
    (tmp_path / "peftstate.json").write_bytes(data)
    with pytest.warns(errors.StateMismatchWarning, match=r"packages\.peft: saved '0.1.0'"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


def test_e1_the_tokenizer_and_its_template(load_base, with_lora, tmp_path):
    """Sides and chat template of the tokenizer are put back; another vocabulary is refused."""
    tokenizer = make_tokenizer(size=300, padding_side="left")
    with_lora(load_base()).save_pretrained(tmp_path, tokenizer=tokenizer)
    again = make_tokenizer(size=300, padding_side="right")
    peftstate.PeftModel.from_pretrained(load_base(), tmp_path, tokenizer=again)
    assert again.padding_side == "left"
    with pytest.raises(errors.TokenizerMismatchError):
        peftstate.PeftModel.from_pretrained(
            load_base(), tmp_path, tokenizer=make_tokenizer(size=280)
        )


def test_e2_another_batch_or_padding(load_base, with_lora, tmp_path):
    """The probe keeps its own inputs, so what is compared has the same shape and padding."""
    model = with_lora(load_base("bf16"))
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]])}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    model.save_pretrained(tmp_path, prediction_probe=inputs)
    assert peftstate.verify(model, tmp_path).ok
    record = peftstate.read_manifest(tmp_path).sections["predictions"]
    assert record.inputs["attention_mask"].shape == (2, 3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    report = peftstate.verify(model, tmp_path).of("predictions")
    assert "max_difference" in [mismatch.field for mismatch in report.mismatches]


@pytest.fixture
def edited(load_base, with_lora, tmp_path):
    """Saves an adapter and edits its record of the environment: `edited(**fields)`."""

    def edit(**fields):
        with_lora(load_base()).save_pretrained(tmp_path)
        manifest = peftstate.read_manifest(tmp_path)
        record = attrs.evolve(manifest.sections["environment"], **fields)
        sections = {**manifest.sections, "environment": record}
        data = attrs.evolve(manifest, sections=sections).to_json()
        (tmp_path / "peftstate.json").write_bytes(data)
        return tmp_path

    return edit


def test_f1_other_versions(edited, load_base):
    """Another version of a library is a warning, and an error for who asks for it."""
    folder = edited(python="3.9.0")
    with pytest.warns(errors.StateMismatchWarning, match=r"environment\.python: saved '3\.9\.0'"):
        peftstate.PeftModel.from_pretrained(load_base(), folder)
    with pytest.raises(errors.EnvironmentMismatchError):
        peftstate.PeftModel.from_pretrained(
            load_base(), folder, on_mismatch={"environment": "error"}
        )


def test_f2_another_device(edited, load_base):
    """Another kind of device is a warning."""
    folder = edited(devices=("cuda",), accelerators=("0: NVIDIA H100",))
    with pytest.warns(errors.StateMismatchWarning, match=r"environment\.accelerators"):
        peftstate.PeftModel.from_pretrained(load_base(), folder)


def test_f3_determinism_and_matmul_precision(load_base, with_lora, tmp_path):
    """Flags of the process that changed are a warning; they are not set."""
    with_lora(load_base()).save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(mode=True)
    with pytest.warns(errors.StateMismatchWarning, match=r"runtime\..*deterministic"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)
    assert torch.are_deterministic_algorithms_enabled()


def test_f4_tensors_that_are_not_here(load_base, with_lora, tmp_path):
    """Weights of the base that cannot be read here are not compared, and a warning says so."""
    model = with_lora(load_base())
    model.save_pretrained(tmp_path)
    head = model.get_base_model().lm_head
    head.weight = torch.nn.Parameter(head.weight.to("meta"), requires_grad=False)
    with pytest.warns(errors.StateMismatchWarning, match="1 of 29 tensors .* cannot be read"):
        report = peftstate.verify(model, tmp_path)
    assert report.of("base_model").ok
    head.weight = torch.nn.Parameter(torch.empty(3, 64, device="meta"), requires_grad=False)
    with pytest.warns(errors.StateMismatchWarning):
        report = peftstate.verify(model, tmp_path)
    assert [mismatch.field for mismatch in report.of("base_model").mismatches] == [
        "tensors[lm_head.weight].shape"
    ]


def test_f5_code_of_the_model_itself(load_base, with_lora, tmp_path):
    """A model of another class, which other code computes, is refused."""
    with_lora(load_base()).save_pretrained(tmp_path)

    class LlamaForMine(transformers.LlamaForCausalLM):
        """As remote code would bring it."""

    base = load_base()
    base.__class__ = LlamaForMine
    with pytest.raises(
        errors.BaseModelMismatchError, match="model_class: saved 'LlamaForCausalLM'"
    ):
        peftstate.PeftModel.from_pretrained(base, tmp_path)
