"""`install`: PEFT's own classes save and load with the whole state."""

from __future__ import annotations

import functools
import inspect
import random
import threading

import peft
import pytest
import torch
import transformers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peft import LoraConfig

import peftstate
from peftstate import errors

METHODS = ("__init__", "save_pretrained", "from_pretrained", "load_adapter")


@pytest.fixture(autouse=True)
def _uninstalled():
    """Leave PEFT's classes as they were, whatever a test does."""
    before = {name: vars(peft.PeftModel)[name] for name in METHODS}
    yield
    peftstate.uninstall()
    for name, method in before.items():
        setattr(peft.PeftModel, name, method)


@pytest.fixture
def wrapped():
    """Wraps a base model as code does that never heard of peftstate."""

    def wrap(base, **fields):
        fields = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields}
        return peft.get_peft_model(base, LoraConfig(**fields))

    return wrap


@pytest.fixture
def saved(load_base, wrapped, tmp_path):
    """The folder of an adapter on an nf4 base, saved by plain PEFT's calls behind `install`."""
    with peftstate.installed():
        wrapped(load_base("nf4")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_nothing_is_wrapped_by_importing():
    """Without `install` PEFT's classes are PEFT's."""
    assert all(not hasattr(vars(peft.PeftModel)[name], "__wrapped__") for name in METHODS[:2])


def test_plain_calls_save_and_verify(saved, load_base):
    """PEFT's own names write a manifest, restore, and refuse a wrong base."""
    assert peftstate.verify_files(saved).ok
    with peftstate.installed():
        loaded = peft.PeftModel.from_pretrained(load_base("nf4"), saved)
        assert isinstance(loaded, peftstate.PeftModel)
        with pytest.raises(errors.QuantizationMismatchError):
            peft.PeftModel.from_pretrained(load_base("bf16"), saved)
        with pytest.raises(errors.QuantizationMismatchError):
            peft.PeftModelForCausalLM.from_pretrained(load_base("bf16"), saved)


def test_auto_classes_rebuild_the_base(saved, causal_lm, logits, load_base):
    """PEFT's auto class gives the quantized model, which it does not by itself."""
    with peftstate.installed():
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(saved)
        given = peft.PeftModel.from_pretrained(load_base("nf4"), saved)
    assert loaded.get_base_model().config.quantization_config is not None
    assert torch.equal(logits(loaded), logits(given))


def test_a_load_is_for_inference_as_in_peft(saved, load_base):
    """`is_trainable` is False by default: eval mode, frozen, and the generators stay."""
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    with peftstate.installed():
        model = peft.PeftModel.from_pretrained(load_base("nf4"), saved)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_models_are_attached_before_they_are_trained(load_base, wrapped, tmp_path, logits):
    """A norm that is trained and frozen again afterwards is kept: its first value was seen."""
    with peftstate.installed():
        model = wrapped(load_base("fp32"))
        model.get_base_model().model.norm.weight.data += 0.5
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(load_base("fp32"), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_models_made_before_are_saved_with_their_state(load_base, wrapped, tmp_path):
    """`install` also reaches objects that PEFT made before it."""
    model = wrapped(load_base())
    with peftstate.installed():
        model.save_pretrained(tmp_path)
    assert type(model) is peftstate.PeftModelForCausalLM
    assert peftstate.verify(model, tmp_path).ok


def test_a_method_that_was_bound_before_is_not_reached(load_base, wrapped, tmp_path):
    """As `install` says of itself."""
    bound = wrapped(load_base()).save_pretrained
    with peftstate.installed():
        bound(tmp_path)
    assert not (tmp_path / "peftstate.json").exists()


def test_load_adapter_is_verified(saved, load_base, wrapped):
    """So that the Trainer's resuming is."""
    with peftstate.installed():
        model = wrapped(load_base("bf16"))
        with pytest.raises(errors.QuantizationMismatchError):
            model.load_adapter(saved, "more")
        assert list(model.peft_config) == ["default"]


def test_options_are_for_loads_that_do_not_say(saved, load_base, tmp_path, wrapped):
    """`on_mismatch` and `require_manifest` of `install`; a caller's own go before them."""
    wrapped(load_base()).save_pretrained(tmp_path / "plain")
    with peftstate.installed(on_mismatch={"quantization": "warn"}, require_manifest=True):
        with pytest.raises(errors.ManifestNotFoundError):
            peft.PeftModel.from_pretrained(load_base(), tmp_path / "plain")
        with pytest.raises(errors.QuantizationMismatchError):
            peft.PeftModel.from_pretrained(load_base(), saved, on_mismatch="error")
        model = wrapped(load_base())
        with pytest.raises(errors.ManifestNotFoundError):
            model.load_adapter(tmp_path / "plain", "more")
    with pytest.raises(ValueError, match="there is no section 'weights'"):
        peftstate.install(on_mismatch={"weights": "warn"})


def test_trusted_keys_are_for_loads_that_do_not_say(saved, load_base, tmp_path):
    """Nothing but what was signed with one of them is loaded, by whatever calls."""
    key = Ed25519PrivateKey.generate()
    with peftstate.installed():
        model = peft.PeftModel.from_pretrained(load_base("nf4"), saved)
        model.save_pretrained(tmp_path / "signed", sign_with=key)
    with peftstate.installed(trusted_keys=iter([key.public_key()])):
        for _ in range(2):
            model = peft.PeftModel.from_pretrained(load_base("nf4"), tmp_path / "signed")
        with pytest.raises(errors.SignatureError, match="there is no signature"):
            peft.PeftModel.from_pretrained(load_base("nf4"), saved)
        with pytest.raises(errors.SignatureError, match="there is no signature"):
            peft.AutoPeftModelForCausalLM.from_pretrained(saved)
        with pytest.raises(errors.SignatureError, match="there is no signature"):
            model.load_adapter(saved, "more")
        with pytest.raises(errors.SignatureError, match="transformers would load this adapter by"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "signed")
    with pytest.raises(TypeError, match="takes several keys"):
        peftstate.install(trusted_keys=key.public_key())


def test_a_merge_is_known(load_base, wrapped, tmp_path):
    """PEFT's own calls merge, save and load without a warning that the weights may differ."""
    with peftstate.installed():
        model = wrapped(load_base("bf16"))
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(load_base("bf16"), tmp_path)
    assert torch.equal(
        loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight,
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight,
    )


def test_uninstall_puts_the_methods_back():
    """The very objects that were there; to install or uninstall twice is to do it once."""
    before = {name: vars(peft.PeftModel)[name] for name in METHODS}
    peftstate.install()
    installed = {name: vars(peft.PeftModel)[name] for name in METHODS}
    peftstate.install(require_manifest=True)
    assert {name: vars(peft.PeftModel)[name] for name in METHODS} == installed
    assert not before.items() & installed.items()
    peftstate.uninstall()
    peftstate.uninstall()
    assert {name: vars(peft.PeftModel)[name] for name in METHODS} == before


def test_installed_goes_back_to_what_was_installed(load_base, wrapped, saved, tmp_path):
    """A ``with`` inside an installation ends with the outer options."""
    wrapped(load_base()).save_pretrained(tmp_path / "plain")
    peftstate.install(require_manifest=True)
    with peftstate.installed(require_manifest=False), pytest.warns(errors.MissingManifestWarning):
        peft.PeftModel.from_pretrained(load_base(), tmp_path / "plain")
    with pytest.raises(errors.ManifestNotFoundError):
        peft.PeftModel.from_pretrained(load_base(), tmp_path / "plain")


def test_signatures_are_still_pefts():
    """Code that inspects the methods, or passes arguments by place, sees no change."""
    before = {name: inspect.signature(getattr(peft.PeftModel, name)) for name in METHODS}
    with peftstate.installed():
        after = {name: inspect.signature(getattr(peft.PeftModel, name)) for name in METHODS}
    assert after == before


def counting(original, calls):
    """A wrapper such as other libraries put over PEFT's `save_pretrained`."""

    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        calls.append(type(self).__name__)
        return original(self, *args, **kwargs)

    return save_pretrained


def test_a_patch_that_was_there_before_is_called(load_base, wrapped, tmp_path):
    """What another library did to the method still happens, below ours."""
    calls = []
    peft.PeftModel.save_pretrained = counting(peft.PeftModel.save_pretrained, calls)
    with peftstate.installed():
        wrapped(load_base()).save_pretrained(tmp_path)
    assert calls == ["PeftModelForCausalLM"]
    assert peftstate.verify_files(tmp_path).ok


def test_a_patch_on_top_of_ours_stays(load_base, wrapped, tmp_path):
    """Uninstalling does not throw another library's wrapper away; ours below only passes on."""
    peftstate.install()
    calls = []
    theirs = peft.PeftModel.save_pretrained = counting(peft.PeftModel.save_pretrained, calls)
    peftstate.install()
    assert peft.PeftModel.save_pretrained is theirs
    peft.PeftModel.save_pretrained(wrapped(load_base()), tmp_path / "installed")
    assert (tmp_path / "installed" / "peftstate.json").exists()
    peftstate.uninstall()
    assert peft.PeftModel.save_pretrained is theirs
    wrapped(load_base()).save_pretrained(tmp_path / "uninstalled")
    assert not (tmp_path / "uninstalled" / "peftstate.json").exists()
    assert calls


def test_unsloths_way_of_binding(load_base, wrapped, tmp_path):
    """A library that keeps a model's method and calls it later is reached, if it does so after."""
    with peftstate.installed():
        model = wrapped(load_base())
        model.original_model_save_pretrained = model.save_pretrained
        model.original_model_save_pretrained(tmp_path)
    assert (tmp_path / "peftstate.json").exists()


def test_a_class_that_is_not_pefts_is_told(load_base, tmp_path):
    """A subclass that we do not know is saved as PEFT does it, with a warning that says so."""

    class Mine(peft.PeftModelForCausalLM):
        pass

    with peftstate.installed():
        model = Mine(load_base(), LoraConfig(task_type="CAUSAL_LM"))
        with pytest.warns(errors.UnverifiedWarning, match=r"^peftstate knows no Mine, so it is"):
            model.save_pretrained(tmp_path)
    assert not (tmp_path / "peftstate.json").exists()


def test_what_transformers_loads_by_itself_is_told(saved, load_base, tmp_path, wrapped):
    """`pipeline(adapter_folder)` makes no PEFT model; that it verified nothing is said."""
    telling = pytest.warns(errors.UnverifiedWarning, match="transformers loaded this adapter by")
    with peftstate.installed(), telling:
        transformers.AutoModelForCausalLM.from_pretrained(saved)
    wrapped(load_base()).save_pretrained(tmp_path / "plain")
    with peftstate.installed():  # without a manifest there is nothing to tell
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_threads_that_call_peft_are_all_reached(load_base, wrapped, tmp_path):
    """A save of ours in one thread does not turn the wrappers off in another one."""
    with peftstate.installed():
        models = [wrapped(load_base()) for _ in range(4)]
        threads = [
            threading.Thread(target=model.save_pretrained, args=(tmp_path / str(number),))
            for number, model in enumerate(models)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all((tmp_path / str(number) / "peftstate.json").exists() for number in range(4))
