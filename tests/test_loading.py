"""Loads that fail leave no trace, and adapters that are loaded into a live model are verified."""

from __future__ import annotations

import copy
import threading

import attrs
import peft
import pytest
import torch
import transformers
from peft import LoraConfig, prepare_model_for_kbit_training

import peftstate
from peftstate import _loading, errors
from peftstate.sections import SECTIONS
from peftstate.sections import _bitsandbytes_forms as forms
from tests.conftest import IDS

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")


def trace(model):
    """All that a load could leave behind on a model."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "flags": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "parameters": {
            name: (id(p), p.data_ptr(), p.dtype, p.requires_grad)
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }


def break_section(monkeypatch, name):
    """Have the restore of a section fail."""

    def fail(record, view):
        raise ValueError("no such thing here")

    broken = [
        attrs.evolve(section, restore=fail) if section.name == name else section
        for section in SECTIONS
    ]
    monkeypatch.setattr("peftstate._steps.SECTIONS", tuple(broken))


@pytest.fixture
def saved(load_base, with_lora, tmp_path):
    """The folder of an adapter of a base model that was prepared for k-bit training."""
    model = with_lora(prepare_model_for_kbit_training(load_base("nf4")))
    model.generation_config.max_new_tokens = 3
    model.config.eos_token_id = 5
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "at", [section.name for section in SECTIONS if section.restore and not section.is_optional]
)
def test_a_load_that_fails_leaves_the_base_as_it_was(saved, load_base, monkeypatch, logits, at):
    """Whatever section cannot be restored, modules, flags, dtypes, data and generators are back."""
    base = load_base("nf4")
    before, generator = trace(base), torch.get_rng_state()
    break_section(monkeypatch, at)
    with pytest.raises(errors.RestoreError) as caught:
        peftstate.PeftModel.from_pretrained(base, saved)
    assert caught.value.section == at
    assert isinstance(caught.value.__cause__, ValueError)
    assert trace(base) == before
    assert torch.equal(torch.get_rng_state(), generator)
    monkeypatch.undo()
    loaded = peftstate.PeftModel.from_pretrained(base, saved)
    again = peftstate.PeftModel.from_pretrained(load_base("nf4"), saved)
    assert torch.equal(logits(loaded.eval()), logits(again.eval()))


def test_a_kbit_prepared_base_comes_back_on_a_bare_base(load_base, with_lora, logits, tmp_path):
    """What `prepare_model_for_kbit_training` did is restored without the caller doing it again."""
    model = with_lora(prepare_model_for_kbit_training(load_base("nf4")))
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base("nf4"), tmp_path)
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_load_adapter_is_verified_and_exact(load_base, with_lora, logits, tmp_path):
    """An adapter that is loaded into a live model gives the logits it was saved with."""
    one, two = with_lora(load_base("bf16")), with_lora(load_base("bf16"))
    for parameter in two.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    two.save_pretrained(tmp_path / "two")
    one.eval()
    alone = logits(one)
    generator = torch.get_rng_state()
    one.load_adapter(tmp_path / "two", "second")
    assert torch.equal(torch.get_rng_state(), generator)
    assert one.active_adapters == ["default"]
    assert torch.equal(logits(one), alone)
    one.set_adapter("second")
    assert torch.equal(logits(one), logits(two.eval()))


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_load_adapter_refuses_another_base_and_is_gone_again(
    load_base, with_lora, logits, tmp_path, kind
):
    """An adapter of another base raises, and the live model is as it was."""
    with_lora(load_base("bf16")).save_pretrained(tmp_path)
    base = load_base(kind)
    base.lm_head.weight.data[0] += 1
    model = with_lora(base).eval()
    before, expected = trace(model), logits(model)
    before = trace(model)
    with pytest.raises(errors.StateMismatchError):
        model.load_adapter(tmp_path, "second")
    assert trace(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_load_adapter_keeps_the_live_special_ids(load_base, with_lora, tmp_path):
    """Trainers set the padding of their tokenizer, which a model has one of for all adapters."""
    base = load_base()
    base.config.pad_token_id = 2
    with_lora(base).save_pretrained(tmp_path)
    live = with_lora(load_base())
    with pytest.warns(errors.StateMismatchWarning) as caught:
        live.load_adapter(tmp_path, "more")
    (message,) = (str(warning.message) for warning in caught)
    assert message == (
        "The adapter was saved with {'pad_token_id': 2} in the base model's config, where the live "
        "model has {'pad_token_id': 0}, which stays so."
    )
    assert live.config.pad_token_id == 0


def run_in_bf16(model):
    """Run a model as a trainer with ``bf16=True`` does, which casts biases of quantized layers."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("runs", ["saved", "live"])
def test_load_adapter_fits_a_base_that_has_run_or_not(load_base, with_lora, tmp_path, kind, runs):
    """bitsandbytes casts biases for good when it runs a layer; the adapter is not at fault."""
    bases = [
        prepare_model_for_kbit_training(load_base(kind), use_gradient_checkpointing=False)
        for _ in range(2)
    ]
    saved, live = map(with_lora, bases)
    run_in_bf16((live if runs == "live" else saved).train())
    biases = [base.model.layers[0].self_attn.o_proj.bias for base in bases]
    assert biases[0].dtype != biases[1].dtype
    saved.save_pretrained(tmp_path)
    live.load_adapter(tmp_path, "more")
    assert peftstate.verify(saved, tmp_path).ok
    live.set_adapter("more")
    assert torch.equal(run_in_bf16(live.eval()), run_in_bf16(saved.eval()))


@pytest.fixture
def packing(load_base):
    """Skips a test where running a 4-bit layer does not pack it."""
    base = load_base("nf4")
    if not forms.can_hold(base.model.layers[0].mlp.up_proj, forms.PACKED):
        pytest.skip("this CPU packs no 4-bit layers")


@pytest.mark.usefixtures("packing")
def test_load_adapter_fits_a_base_whose_layers_will_be_packed(
    load_base, with_lora, logits, tmp_path
):
    """The first run in eval mode packs a fresh layer as those of the save were."""
    saved, live = (with_lora(load_base("nf4")).eval() for _ in range(2))
    expected = logits(saved)
    saved.save_pretrained(tmp_path)
    live.load_adapter(tmp_path, "more")
    live.set_adapter("more")
    assert torch.equal(logits(live), expected)


@pytest.mark.usefixtures("packing")
def test_a_save_as_a_trainer_makes_it_leaves_packed_layers(load_base, with_lora, logits, tmp_path):
    """Trainers pass ``state_dict=None``, with which PEFT would ask the model and unpack it."""
    model = with_lora(load_base("nf4")).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path, state_dict=None)
    assert peftstate.verify(model, tmp_path).ok
    assert torch.equal(logits(model), expected)
    loaded = peftstate.PeftModel.from_pretrained(load_base("nf4"), tmp_path)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.usefixtures("packing")
def test_train_undoes_the_packing(load_base, with_lora, logits, tmp_path):
    """No gradient goes through packed layers; `train` brings back what they were, also reloaded."""
    model = with_lora(load_base("nf4"), lora_dropout=0.0).train()
    fresh = copy.deepcopy(model)
    logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base("nf4"), tmp_path)
    gradients = []
    for each in (fresh, model, loaded):
        each.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    for expected, *others in zip(*gradients, strict=True):
        assert expected.any()
        assert all(torch.equal(expected, other) for other in others)
    assert torch.equal(logits(model.eval()), logits(loaded.eval()))
    assert peftstate.verify(model, tmp_path).of("base_model", "quantization").ok


def test_load_adapter_over_an_existing_name_is_rolled_back(load_base, with_lora, logits, tmp_path):
    """PEFT keeps the old `lora_alpha` under a name that exists; here that raises, undone."""
    with_lora(load_base(), lora_alpha=64).save_pretrained(tmp_path)
    model = with_lora(load_base()).eval()
    expected = logits(model)
    with pytest.raises(errors.AdapterMismatchError) as caught:
        model.load_adapter(tmp_path, "default")
    assert "config.lora_alpha" in [
        mismatch.field.partition(".default.")[2] for mismatch in caught.value.mismatches
    ]
    assert torch.equal(logits(model), expected)


def test_load_adapter_restores_the_values_of_an_existing_name(
    load_base, with_lora, logits, tmp_path
):
    """Loading a checkpoint over the adapter it came from gives the checkpoint's logits."""
    model = with_lora(load_base()).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 1
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), expected)


def test_loads_in_threads_do_not_disturb_each_other(load_base, with_lora, logits, tmp_path):
    """Concurrent loads of mixed dtypes, and of adapters into one model, are all right."""
    kinds = ("fp32", "bf16")
    expected = {}
    for kind in kinds:
        model = with_lora(load_base(kind)).eval()
        model.save_pretrained(tmp_path / kind)
        expected[kind] = logits(model)
    live = with_lora(load_base("fp32")).eval()
    bases = [load_base(kind) for kind in kinds * 4]
    failures = []

    def load(index):
        kind = kinds[index % 2]
        try:
            loaded = peftstate.PeftModel.from_pretrained(bases[index], tmp_path / kind)
            live.load_adapter(tmp_path / "fp32", f"adapter-{index}")
            if not torch.equal(logits(loaded.eval()), expected[kind]):
                failures.append(f"{index}: other logits")
        except Exception as error:  # noqa: BLE001 - a thread's error must reach the test
            failures.append(f"{index}: {error!r}")

    threads = [threading.Thread(target=load, args=(index,)) for index in range(len(bases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(live.peft_config) == len(bases) + 1


def test_only_one_load_runs_at_a_time(saved, load_base, monkeypatch):
    """Every load holds the lock of the process, re-entrantly."""
    from peftstate._steps import LOCK

    held = []
    original = _loading.load_model

    def load_model(*args, **kwargs):
        other = threading.Thread(target=lambda: held.append(LOCK.acquire(blocking=False)))
        other.start()
        other.join()
        return original(*args, **kwargs)

    monkeypatch.setattr("peftstate._models.load_model", load_model)
    with LOCK:
        peftstate.PeftModel.from_pretrained(load_base("nf4"), saved)
    assert held == [False]


def test_a_plain_adapter_can_be_loaded_into_a_live_model(load_base, with_lora, tmp_path):
    """Without a manifest `load_adapter` is PEFT's, after a warning."""
    peft.get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    model = with_lora(load_base())
    with pytest.warns(errors.MissingManifestWarning):
        model.load_adapter(tmp_path, "plain")
    assert list(model.peft_config) == ["default", "plain"]
    with pytest.raises(errors.ManifestNotFoundError):
        model.load_adapter(tmp_path, "again", require_manifest=True)


def test_embeddings_that_an_adapter_brings_are_not_left_in_the_base(
    load_base, with_lora, monkeypatch, tmp_path
):
    """PEFT writes saved embeddings into the base model in place; a load that fails undoes it."""
    base = load_base()
    base.resize_token_embeddings(70, mean_resizing=False)
    model = with_lora(base, target_modules=["q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other = load_base()
    before = other.get_input_embeddings().weight
    values = before.detach().clone()
    break_section(monkeypatch, "training")
    with pytest.raises(errors.RestoreError):
        peftstate.PeftModel.from_pretrained(other, tmp_path)
    assert other.get_input_embeddings().weight is before
    assert torch.equal(before, values)
    assert other.config.vocab_size == 64


def test_a_load_makes_no_weights_that_it_overwrites(load_base, with_lora, tmp_path, monkeypatch):
    """For plain LoRA nothing is drawn at random: PEFT waits for the weights of the file."""
    with_lora(load_base("nf4"), init_lora_weights=True).save_pretrained(tmp_path)
    drawn = []
    original = torch.nn.init.kaiming_uniform_

    def counting(tensor, *args, **kwargs):
        if tensor.device.type != "meta":
            drawn.append(tuple(tensor.shape))
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", counting)
    model = peftstate.PeftModel.from_pretrained(load_base("nf4"), tmp_path, is_trainable=False)
    model.load_adapter(tmp_path, "more")
    assert drawn == []
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_is_more_than_a_and_b_is_made(load_base, with_lora, tmp_path, logits, fields):
    """Variants of LoRA make things beside the weights in the file, so PEFT begins them as ever."""
    model = with_lora(load_base(), **fields)
    model.save_pretrained(tmp_path)
    loaded = peftstate.PeftModel.from_pretrained(load_base(), tmp_path, is_trainable=False)
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_an_adapter_that_is_replaced_keeps_its_parameters(load_base, with_lora, tmp_path):
    """An optimizer holds these objects: resuming loads values into them."""
    with_lora(load_base()).save_pretrained(tmp_path)
    model = with_lora(load_base())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert peftstate.verify(model, tmp_path).of("adapters").ok


def test_no_placeholder_is_left_in_a_model(load_base, with_lora, tmp_path):
    """Where another base model is let through that the weights do not fit, the load fails."""
    with_lora(load_base("bf16")).save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64
    )
    base = transformers.LlamaForCausalLM(config).bfloat16()
    with pytest.raises(errors.AdapterLoadError) as caught:
        peftstate.PeftModel.from_pretrained(base, tmp_path, on_mismatch="ignore")
    assert str(caught.value) == (
        "adapters: size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A"
        ".weight: the model takes a tensor of shape [4, 32], the adapter has one of shape [4, 64]; "
        "the base model is another one"
    )
    assert not any(tensor.is_meta for tensor in base.parameters())
    assert type(base.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_layers_that_have_other_names_now_are_left_to_peft(tmp_path):
    """PEFT knows layers by the names that they had in older releases of transformers."""
    old = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4)})
    new = torch.nn.ModuleDict({"second": torch.nn.Linear(4, 4)})
    new._checkpoint_conversion_mapping = {"^first": "second"}
    config = LoraConfig(r=2, target_modules="first|second", init_lora_weights=False)
    saved = peftstate.get_peft_model(old, config)
    saved.save_pretrained(tmp_path)
    allowed = {"base_model": "warn", "adapters": "warn", "dtype": "warn", "training": "warn"}
    with pytest.warns(errors.StateMismatchWarning):
        loaded = peftstate.PeftModel.from_pretrained(new, tmp_path, on_mismatch=allowed)
    theirs = saved.base_model.model["first"].lora_B["default"].weight
    assert torch.equal(loaded.base_model.model["second"].lora_B["default"].weight, theirs)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pefts_checks_of_a_further_adapter_are_made(load_base, with_lora, tmp_path):
    """PEFT warns of adapters beside one that rewrote the base model, also if it loads nothing."""
    with_lora(load_base()).save_pretrained(tmp_path)
    model = with_lora(load_base(), init_lora_weights="pissa")
    with pytest.raises(errors.BaseModelMismatchError):
        model.load_adapter(tmp_path, "more")
    with pytest.warns(UserWarning, match="PiSSA changes the base weights"):
        model.load_adapter(tmp_path, "more", on_mismatch={"base_model": "ignore"})
