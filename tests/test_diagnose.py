"""`diagnose`: each cause is named, with the number that it makes, and no other."""

from __future__ import annotations

import random
import shutil

import peft
import pytest
import torch
import transformers

import peftstate
from peftstate._demo.tiny import tiny_checkpoint
from peftstate._diagnosis import Effect
from peftstate.errors import AdapterLoadError, BaseModelMismatchError, ManifestNotFoundError
from peftstate.sections import _platform, predictions
from peftstate.sections._probe import predict
from tests._diagnosis import in_bfloat16
from tests.conftest import IDS

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


def nf4(**fields):
    """A quantization config that is nf4 but for some fields."""
    return transformers.BitsAndBytesConfig(**NF4 | fields)


@pytest.fixture
def save(tmp_path):
    """Saves a model in eval mode: `save(model)` gives the folder."""

    def run(model, **keywords):
        model.eval().save_pretrained(tmp_path / "adapter", **keywords)
        return tmp_path / "adapter"

    return run


def run(model):
    """The logits in eval mode."""
    was_training = model.training
    with torch.no_grad():
        output = model.eval()(input_ids=IDS).logits
    model.train(was_training)
    return output


def apart(first, second):
    """The largest difference of two tensors."""
    return float((first.double() - second.double()).abs().max())


def only(diagnosis):
    """The one cause that was measured, which explains all there is."""
    (cause,) = diagnosis.causes
    assert cause.effect == diagnosis.total
    assert diagnosis.rest is not None
    assert diagnosis.rest.is_none
    assert not diagnosis.ok
    return cause


def words(cause):
    """What a cause says."""
    return cause.name, cause.section, cause.saved, cause.found


def test_nothing_differs(load_base, with_lora, save):
    """Where plain PEFT brings the saved model back, no cause is made up, and no number."""
    folder = save(with_lora(load_base("fp32")))
    found = peftstate.diagnose(folder, as_plain_peft=True)
    assert found.ok
    assert found.causes == ()
    assert (
        found.total
        == found.rest
        == Effect(max_difference=0.0, kl_divergence=0.0, top1_agreement=1.0)
    )
    assert found.verdict == "The predictions are the same, to the last bit."


def test_adapter_dtype(load_base, with_lora, save):
    """PEFT casts an adapter to float32 when it loads it; what that does is measured."""
    folder = save(in_bfloat16(with_lora(load_base("bf16"))))
    cause = only(peftstate.diagnose(folder, as_plain_peft=True, prediction_probe=IDS))
    assert words(cause) == ("adapter dtype", "dtype", "bfloat16", "float32")

    exact = run(peftstate.AutoPeftModelForCausalLM.from_pretrained(folder))
    users = run(peft.PeftModel.from_pretrained(load_base("bf16"), folder))
    assert cause.effect.max_difference == apart(exact, users) > 0


def test_base_dtype(load_base, with_lora, save):
    """A base model in another dtype."""
    folder = save(with_lora(load_base("fp32")))
    users = peft.PeftModel.from_pretrained(load_base("bf16"), folder)
    cause = only(peftstate.diagnose(folder, users))
    assert words(cause) == ("base dtype", "dtype", "float32", "bfloat16")


@pytest.mark.parametrize(
    ("config", "name", "kind"),
    [
        (nf4(bnb_4bit_quant_type="fp4"), "quantization type", "fp4"),
        (nf4(bnb_4bit_use_double_quant=False), "quantization type", "nf4, double_quant False"),
        (transformers.BitsAndBytesConfig(load_in_8bit=True), "quantization type", "int8"),
        (None, "quantization", "none"),
    ],
    ids=["fp4", "single", "int8", "unquantized"],
)
def test_quantization(load_base, with_lora, save, *, config, name, kind):
    """A base model that is quantized in another way, or not at all."""
    folder = save(with_lora(load_base("nf4")))
    users = peft.PeftModel.from_pretrained(load_base("bf16", quantization_config=config), folder)
    cause = only(peftstate.diagnose(folder, users))
    assert (cause.name, cause.section, cause.found) == (name, "quantization", kind)
    assert cause.saved.startswith("nf4")


def test_base_that_should_not_be_quantized(load_base, with_lora, save):
    """The other way round: only the user's base model is quantized."""
    folder = save(with_lora(load_base("bf16")))
    users = peft.PeftModel.from_pretrained(load_base("nf4"), folder)
    cause = only(peftstate.diagnose(folder, users))
    assert words(cause) == ("quantization", "quantization", "none", "nf4")


def test_compute_dtype(load_base, with_lora, save):
    """4-bit layers that multiply in another dtype."""
    folder = save(with_lora(load_base("nf4")))
    config = nf4(bnb_4bit_compute_dtype=torch.float32)
    users = peft.PeftModel.from_pretrained(load_base("bf16", quantization_config=config), folder)
    (cause,) = peftstate.diagnose(folder, users).causes
    assert (cause.name, cause.section) == ("compute dtype", "quantization")
    assert (cause.saved, cause.found) == ("bfloat16", "float32")


def test_attention(load_base, with_lora, save):
    """Another implementation of attention."""
    folder = save(with_lora(load_base("fp32", attn_implementation="eager")))
    users = peft.PeftModel.from_pretrained(load_base("fp32", attn_implementation="sdpa"), folder)
    cause = only(peftstate.diagnose(folder, users))
    assert words(cause) == ("attention", "implementation", "eager", "sdpa")


def test_tensors_that_peft_drops(load_base, with_lora, save):
    """A norm that was trained beside the adapter."""
    model = with_lora(load_base("fp32"))
    norm = model.get_base_model().model.norm.weight.requires_grad_()
    norm.data += 0.5
    cause = only(peftstate.diagnose(save(model), as_plain_peft=True))
    assert (cause.name, cause.section) == ("tensors PEFT drops", "extra_tensors")
    assert cause.saved == "model.norm.weight"


def test_base_weights(load_base, with_lora, save):
    """A base model with other weights, plain and quantized."""
    for kind in ("fp32", "nf4"):
        folder = save(with_lora(load_base(kind)))
        base = load_base(kind)
        base.model.norm.weight.data[0] += 1
        if kind == "nf4":
            base.model.layers[0].mlp.up_proj.weight.data[:8] ^= 1
        users = peft.PeftModel.from_pretrained(base, folder)
        cause = only(peftstate.diagnose(folder, users))
        assert (cause.name, cause.section) == ("base weights", "base_model")
        assert "model.norm.weight" in cause.saved or "up_proj" in cause.saved


def test_adapter_weights(load_base, with_lora, save):
    """An adapter that was not loaded whole."""
    folder = save(with_lora(load_base("fp32")))
    users = peft.PeftModel.from_pretrained(load_base("fp32"), folder)
    layer = users.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.zero_()
    cause = only(peftstate.diagnose(folder, users))
    assert (cause.name, cause.section) == ("adapter weights", "adapters")


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear")
def test_merged_adapters(load_base, with_lora, save):
    """A merged model comes back unmerged from plain PEFT."""
    for kind in ("bf16", "nf4"):
        model = with_lora(load_base(kind)).eval()
        model.merge_adapter()
        folder = save(model)
        users = peft.PeftModel.from_pretrained(load_base(kind), folder)
        cause = only(peftstate.diagnose(folder, users))
        assert words(cause) == ("merged adapters", "adapters", "default", "none")


def test_active_and_scaled_adapters(load_base, with_lora, save):
    """Of two adapters plain PEFT loads the folder's own, and knows nothing of run-time scaling."""
    model = with_lora(load_base("fp32"))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    torch.nn.init.normal_(
        model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["other"].weight
    )
    model.set_adapter("other")
    found = peftstate.diagnose(save(model), as_plain_peft=True)
    assert words(only(found)) == ("active adapters", "adapters", "other", "default")
    assert "adapters not loaded" in [cause.name for cause in found.unmeasured]

    model = with_lora(load_base("fp32"))
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3.0)
    cause = only(peftstate.diagnose(save(model), as_plain_peft=True))
    assert words(cause) == ("scaling", "adapters", "6.0", "2.0")


def test_disabled_adapters(load_base, with_lora, save):
    """Adapters that are not applied."""
    folder = save(with_lora(load_base("fp32")))
    users = peft.PeftModel.from_pretrained(load_base("fp32"), folder)
    users.base_model.disable_adapter_layers()
    cause = only(peftstate.diagnose(folder, users))
    assert words(cause) == ("adapters applied", "adapters", "applied", "disabled")


def test_base_config(load_base, with_lora, save):
    """A base model that was built with another setting of its rotary embedding."""
    base = load_base("fp32")
    folder = save(with_lora(base))
    other = load_base("fp32")
    rotary = other.model.rotary_emb
    rotary.inv_freq *= 2
    users = peft.PeftModel.from_pretrained(other, folder)
    cause = only(peftstate.diagnose(folder, users))
    assert (cause.name, cause.section) == ("base config", "base_model")
    assert cause.saved == "model.rotary_emb.inv_freq"


def test_train_mode(load_base, with_lora, tmp_path):
    """What dropout does is measured from the saved random numbers, and is not in the total."""
    model = with_lora(load_base("fp32"), lora_dropout=0.5).train()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
    found = peftstate.diagnose(tmp_path, as_plain_peft=True, prediction_probe=IDS)
    (cause,) = found.causes
    assert words(cause) == ("train mode", "training", "train", "eval")
    assert not cause.in_total
    assert cause.effect.max_difference == apart(trained, run(model)) > 0.1
    assert found.total.is_none
    assert not found.ok
    assert found.verdict == "In eval mode and in this environment, the predictions are the same."


def test_all_causes_at_once(load_base, with_lora, save):
    """Each cause has its own number, the largest comes first, and together they explain all."""
    folder = save(in_bfloat16(with_lora(load_base("nf4", attn_implementation="eager"))))
    users = peft.PeftModel.from_pretrained(load_base("fp32", attn_implementation="sdpa"), folder)
    found = peftstate.diagnose(folder, users)
    effects = [cause.effect.max_difference for cause in found.causes]
    assert {cause.name for cause in found.causes} == {
        "adapter dtype",
        "attention",
        "base dtype",
        "quantization",
    }
    assert found.causes[0].name == "quantization"
    assert effects == sorted(effects, reverse=True)
    assert min(effects) > 0
    assert found.rest.is_none


def test_as_tutorials_load_it(load_base, with_lora, save, causal_lm):
    """By default the base model is loaded without any argument, from where the adapter says."""
    folder = save(with_lora(load_base("nf4")))
    found = peftstate.diagnose(folder)
    assert found.causes[0].name == "quantization"
    assert found.model == "plain PEFT on the base model as it is loaded by default"
    assert found.causes == peftstate.diagnose(folder, base=causal_lm).causes


def test_base_that_was_moved(load_base, with_lora, save, causal_lm, tmp_path):
    """A base model that is not where it was is looked for where the caller says."""
    shutil.copytree(causal_lm, tmp_path / "before")
    folder = save(with_lora(load_base("fp32", tmp_path / "before")))
    (tmp_path / "before").rename(tmp_path / "after")
    assert peftstate.diagnose(folder, base=tmp_path / "after", as_plain_peft=True).ok


def test_stored_inputs(load_base, with_lora, save):
    """The inputs that were saved are taken, unless others are passed."""
    folder = save(with_lora(load_base("fp32")), prediction_probe=IDS)
    assert peftstate.diagnose(folder).inputs == "the inputs that were saved"
    found = peftstate.diagnose(folder, prediction_probe=IDS[:1])
    assert found.inputs == "the inputs that were passed"


def test_both_models_and_the_process_are_left_alone(load_base, with_lora, save):
    """The live model predicts and is as before, and the random generators stand where they did."""
    folder = save(in_bfloat16(with_lora(load_base("nf4"))))
    users = peft.PeftModel.from_pretrained(load_base("fp32"), folder).train()
    before = run(users)
    flags = {name: module.training for name, module in users.named_modules()}
    tensors = {name: (p, p.dtype, p.clone()) for name, p in users.named_parameters()}
    states = random.getstate(), torch.get_rng_state()

    peftstate.diagnose(folder, users)

    assert torch.equal(torch.get_rng_state(), states[1])
    assert random.getstate() == states[0]
    assert {name: module.training for name, module in users.named_modules()} == flags
    for name, parameter in users.named_parameters():
        same, dtype, value = tensors[name]
        assert parameter is same
        assert parameter.dtype == dtype
        assert torch.equal(parameter, value)
    assert torch.equal(run(users), before)


def test_what_has_no_number(load_base, with_lora, save):
    """Sampled text and the generation config are told, without a number."""
    model = with_lora(load_base("fp32"))
    model.generation_config.update(do_sample=True, temperature=0.5)
    found = peftstate.diagnose(save(model), as_plain_peft=True)
    told = {cause.name: cause for cause in found.unmeasured}
    assert told["generation config"].note.startswith("changes how text is generated: config.")
    assert told["random numbers"].note.startswith("changes sampled text and dropout: ")
    assert all(cause.effect is None for cause in found.unmeasured)


def test_cause_that_cannot_be_had_alone(load_base, with_lora, save):
    """What does not run with one cause only has no number, and the reason stands there."""
    folder = save(with_lora(load_base("fp32"), modules_to_save=["lm_head"]))
    users = peft.PeftModel.from_pretrained(load_base("bf16"), folder).bfloat16()
    found = peftstate.diagnose(folder, users)
    told = {cause.name: cause.note for cause in found.unmeasured}
    assert told["base dtype"].startswith("the model does not run with it alone (RuntimeError: ")
    assert not found.total.is_none
    assert found.rest.is_none


def test_logits_of_another_shape(load_base, with_lora, save):
    """Then there is no number at all, but what differs is named."""
    base = load_base("fp32")
    base.resize_token_embeddings(72, mean_resizing=False)
    folder = save(with_lora(base), save_embedding_layers=True)
    base = load_base("fp32")
    base.resize_token_embeddings(80, mean_resizing=False)
    users = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    found = peftstate.diagnose(folder, users)
    assert found.total is None
    assert not found.ok
    assert found.verdict == "The logits have another shape than those of the saved model."


def test_model_that_does_not_run(load_base, with_lora, save):
    """Why it does not is the verdict, and what differs is named all the same."""
    folder = save(with_lora(load_base("fp32")))
    users = peft.PeftModel.from_pretrained(load_base("fp32"), folder)
    users.get_base_model().lm_head.bfloat16()
    found = peftstate.diagnose(folder, users)
    assert found.verdict.startswith("The model does not run: RuntimeError: ")
    assert (found.total, found.rest, found.ok) == (None, None, False)
    assert found.unmeasured[0].name == "base dtype"


def test_prompt_that_layers_compute(load_base, tmp_path):
    """PEFT drops these layers, and keeps what they compute: measured, that changes nothing."""
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    )
    peftstate.get_peft_model(load_base("fp32"), config).eval().save_pretrained(tmp_path)
    found = peftstate.diagnose(tmp_path, as_plain_peft=True)
    (cause,) = found.causes
    assert (cause.name, cause.section) == ("tensors PEFT drops", "extra_tensors")
    assert cause.effect.is_none
    assert found.rest.is_none
    assert found.ok


def test_layers_within_a_layer_of_peft(load_base, tmp_path):
    """Quantized layers are found where PEFT put another layer around what holds them."""
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    peftstate.get_peft_model(load_base("nf4"), config).eval().save_pretrained(tmp_path)
    base = load_base("bf16", quantization_config=nf4(bnb_4bit_quant_type="fp4"))
    cause = only(peftstate.diagnose(tmp_path, peft.PeftModel.from_pretrained(base, tmp_path)))
    assert cause.name == "quantization type"


def test_this_environment(load_base, with_lora, save, monkeypatch):
    """What the exact reload predicts otherwise than when it was saved is not in the total."""
    model = with_lora(load_base("fp32"))
    with monkeypatch.context() as there:
        there.setattr(predictions, "predict", lambda *arguments: predict(*arguments) + 1e-6)
        folder = save(model, prediction_probe=IDS)
    monkeypatch.setattr(_platform, "key", lambda kinds: f"elsewhere: {kinds}")
    found = peftstate.diagnose(folder, as_plain_peft=True)
    (cause,) = found.causes
    assert (cause.name, cause.section) == ("this environment", "predictions")
    assert 0 < cause.effect.max_difference < 1e-5
    assert not cause.in_total
    assert found.total.is_none


def test_a_text(tmp_path):
    """A text is made ids of by the tokenizer that lies beside the adapter, or by the base's."""
    checkpoint = tiny_checkpoint(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model = peftstate.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))
    model.eval().save_pretrained(tmp_path / "without")
    model.save_pretrained(tmp_path / "with", tokenizer=tokenizer)
    text = "The baker opened it"
    for folder in (tmp_path / "without", tmp_path / "with"):
        found = peftstate.diagnose(folder, prediction_probe=text)
        inputs = tokenizer(text, return_tensors="pt")
        assert found == peftstate.diagnose(folder, prediction_probe=inputs)
        assert found.inputs == "the inputs that were passed"


def test_without_a_manifest(load_base, with_lora, save):
    """There is nothing to compare with."""
    folder = save(with_lora(load_base("fp32")))
    (folder / "peftstate.json").unlink()
    with pytest.raises(ManifestNotFoundError):
        peftstate.diagnose(folder)


def test_without_an_exact_reload(load_base, with_lora, save, causal_lm, tmp_path):
    """If the base model is not the saved one any more, the error says so."""
    shutil.copytree(causal_lm, tmp_path / "base")
    folder = save(with_lora(load_base("fp32", tmp_path / "base")))
    base = load_base("bf16", tmp_path / "base")
    base.model.norm.weight.data += 1
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(BaseModelMismatchError, match=r"model\.norm\.weight"):
        peftstate.diagnose(folder)


def test_what_plain_peft_cannot_load(load_base, with_lora, save):
    """The error names PEFT's own."""
    base = load_base("fp32")
    base.resize_token_embeddings(72, mean_resizing=False)
    folder = save(with_lora(base, modules_to_save=["embed_tokens"]), save_embedding_layers=True)
    with pytest.raises(AdapterLoadError, match=r"plain PEFT cannot load it \(RuntimeError: "):
        peftstate.diagnose(folder)


def test_arguments_that_exclude_each_other(load_base, with_lora, save):
    """A live model is not loaded."""
    folder = save(with_lora(load_base("fp32")))
    users = peft.PeftModel.from_pretrained(load_base("fp32"), folder)
    with pytest.raises(ValueError, match="as_plain_peft=True loads a model, so none can be passed"):
        peftstate.diagnose(folder, users, as_plain_peft=True)
