"""How axolotl, LLaMA-Factory and Unsloth call PEFT, behind `install`.

These trainers are not installed here: only the shapes of their calls are tested, each as it is in
the source that it names.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import types
import weakref

import peft
import pytest
import torch
from peft import LoraConfig
from transformers.utils.hub import PushToHubMixin

import peftstate
from peftstate import errors
from tests._tokenizers import make_tokenizer


def save_unbound(model, folder):
    """Save by PEFT's method as it is at the time."""
    peft.PeftModel.save_pretrained(model, folder)


LOADS = {
    # axolotl 067b021, src/axolotl/loaders/adapter.py:378
    "axolotl": {"is_trainable": True},
    "axolotl, without autocast": {"is_trainable": True, "autocast_adapter_dtype": False},
    "axolotl, lora_on_cpu": {
        "is_trainable": True,
        "max_memory": {"cpu": "256GiB"},
        "device_map": {"": "cpu"},
    },
    # src/axolotl/loaders/adapter.py:479
    "axolotl, llama-adapter": {"torch_dtype": torch.float16},
    # LLaMA-Factory ff6d4d1, src/llamafactory/model/adapter.py:190 and 212
    "LLaMA-Factory, to merge": {
        "subfolder": None,
        "offload_folder": "offload",
        "cache_dir": None,
        "revision": "main",
        "token": None,
    },
    "LLaMA-Factory, to resume": {
        "is_trainable": True,
        "subfolder": None,
        "offload_folder": "offload",
        "cache_dir": None,
        "revision": "main",
        "token": None,
    },
    # Unsloth 2026.10.9, unsloth/models/loader.py:2082
    "Unsloth": {
        "token": None,
        "revision": None,
        "local_files_only": False,
        "is_trainable": True,
        "trust_remote_code": False,
    },
}
SAVES = {
    # axolotl, src/axolotl/train.py:399
    "axolotl, at the end": lambda model, folder: model.save_pretrained(folder),
    # src/axolotl/core/trainers/base.py:975
    "axolotl, a checkpoint": lambda model, folder: model.save_pretrained(
        folder, state_dict=None, is_main_process=True
    ),
    # LLaMA-Factory, src/llamafactory/train/callbacks.py:144
    "LLaMA-Factory": lambda model, folder: model.save_pretrained(folder, safe_serialization=True),
    # src/llamafactory/v1/core/base_trainer.py:379
    "LLaMA-Factory v1": lambda model, folder: model.save_pretrained(
        folder, state_dict=model.state_dict(), max_shard_size="4GB"
    ),
    # Unsloth, unsloth/models/pp_native.py:1360
    "Unsloth, unbound": save_unbound,
}


@pytest.fixture(autouse=True)
def _installed():
    """Each test runs behind `install`, and leaves PEFT's class as it was."""
    before = peft.PeftModel.save_pretrained
    with peftstate.installed():
        yield
    peft.PeftModel.save_pretrained = before


@pytest.fixture
def wrapped(load_base):
    """Wraps a base model of a kind as these trainers do."""

    def wrap(kind, **fields):
        fields = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields}
        return peft.get_peft_model(load_base(kind), LoraConfig(**fields)).eval()

    return wrap


@pytest.mark.parametrize("shape", LOADS)
def test_loads(shape, wrapped, load_base, logits, tmp_path):
    """What they pass is taken; the model is as it was, on its quantized base."""
    model = wrapped("nf4")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load_base("nf4"), tmp_path, **LOADS[shape])
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(errors.QuantizationMismatchError):
        peft.PeftModel.from_pretrained(load_base("bf16"), tmp_path, **LOADS[shape])


def test_load_of_a_subfolder(wrapped, load_base, logits, tmp_path):
    """LLaMA-Factory's ``adapter_folder``."""
    model = wrapped("bf16")
    model.save_pretrained(tmp_path / "inner")
    options = LOADS["LLaMA-Factory, to resume"] | {"subfolder": "inner"}
    loaded = peft.PeftModel.from_pretrained(load_base("bf16"), str(tmp_path), **options)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("shape", SAVES)
def test_saves(shape, wrapped, load_base, logits, tmp_path):
    """Each writes a manifest, and the model comes back."""
    model = wrapped("nf4")
    SAVES[shape](model, tmp_path)
    assert peftstate.verify_files(tmp_path).ok
    loaded = peft.PeftModel.from_pretrained(load_base("nf4"), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_axolotls_folder(wrapped, load_base, logits, tmp_path):
    """It writes PEFT config, tokenizer and the base's config before it trains.

    axolotl, src/axolotl/train.py:475-484
    """
    model = wrapped("nf4")
    model.peft_config["default"].save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert peftstate.verify_files(tmp_path).ok
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_axolotls_signal_handler(wrapped, tmp_path):
    """It saves when the user interrupts the training, in the handler.

    axolotl, src/axolotl/train.py:167-181
    """
    model = wrapped("bf16")

    def terminate_handler(_, __, model_weakref):
        if model_weakref() is not None:
            model_weakref().save_pretrained(tmp_path)
        raise SystemExit(0)

    reference = weakref.ref(model)
    before = signal.signal(
        signal.SIGINT, lambda signum, frame: terminate_handler(signum, frame, reference)
    )
    try:
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert peftstate.verify_files(tmp_path).ok
    assert peftstate.verify(model, tmp_path).ok


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")  # by PEFT
def test_llama_factorys_conversion_of_pissa(wrapped, load_base, logits, tmp_path):
    """It saves three times with other values in the config, and loads its own backup.

    LLaMA-Factory, src/llamafactory/train/callbacks.py:132-171
    """
    model = wrapped("fp32", init_lora_weights="pissa")
    init = model.peft_config["default"].init_lora_weights
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "pissa_init", safe_serialization=True)
    model.peft_config["default"].init_lora_weights = init
    for name, parameter in model.named_parameters():  # a training
        if "lora_B" in name:
            parameter.data += 0.01
    trained = logits(model)

    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "pissa_backup", safe_serialization=True)
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(
        tmp_path / "pissa_converted",
        safe_serialization=True,
        path_initial_model_for_weight_conversion=str(tmp_path / "pissa_init"),
    )
    model.load_adapter(tmp_path / "pissa_backup", "default", is_trainable=True)
    model.set_adapter("default")
    model.peft_config["default"].init_lora_weights = init

    assert torch.equal(logits(model.eval()), trained)
    for name in ("pissa_init", "pissa_backup", "pissa_converted"):
        assert peftstate.verify_files(tmp_path / name).ok
    backup = peft.PeftModel.from_pretrained(load_base("fp32"), tmp_path / "pissa_backup")
    assert torch.equal(logits(backup), trained)
    converted = peft.PeftModel.from_pretrained(load_base("fp32"), tmp_path / "pissa_converted")
    assert torch.allclose(logits(converted), trained, atol=1e-3)


def unsloths_patch(original):
    """A wrapper over `PeftModel.save_pretrained` that adds to the PEFT config afterwards.

    unsloth_zoo 2026.10.9, temporary_patches/moe_utils.py:4930-4993
    """

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        result = original(self, save_directory, *args, **kwargs)
        path = os.path.join(save_directory, "adapter_config.json")  # noqa: PTH118 - as there
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            config = json.load(file)
        with open(path + ".tmp", "w", encoding="utf-8") as file:  # noqa: PTH123
            marked = {**config, "unsloth_fused_expert_lora": {"lora_B_layout": "peft"}}
            json.dump(marked, file, indent=2, sort_keys=True)
        os.replace(path + ".tmp", path)  # noqa: PTH105
        save_pretrained.calls += 1
        return result

    save_pretrained.calls = 0
    return save_pretrained


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")  # PEFT, of the mark
@pytest.mark.parametrize("first", ["Unsloth", "install"])
@pytest.mark.parametrize("shape", ["axolotl, at the end", "Unsloth, unbound"])
def test_unsloths_patch_composes(first, shape, wrapped, load_base, tmp_path):
    """Theirs is called, whichever came first, and what it writes anew still loads."""
    if first == "Unsloth":
        peftstate.uninstall()
    theirs = peft.PeftModel.save_pretrained = unsloths_patch(peft.PeftModel.save_pretrained)
    peftstate.install()
    model = wrapped("nf4")
    SAVES[shape](model, tmp_path)
    assert theirs.calls == 1 + (first == "install" and "unbound" in shape)
    assert peftstate.verify_files(tmp_path).ok
    loaded = peft.PeftModel.from_pretrained(load_base("nf4"), tmp_path)
    assert peftstate.verify(loaded, tmp_path).of("adapters", "dtype", "quantization").ok


def test_unsloths_methods_of_a_model(wrapped, load_base, logits, tmp_path):
    """It keeps a model's bound method, and binds one of its own in the place.

    unsloth 2026.10.9, unsloth/save.py:8709-8772
    """

    def unsloth_model_save_pretrained(self, *args, **kwargs):
        original = self.original_model_save_pretrained
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        if bound.arguments.get("safe_serialization", True) is None:
            bound.arguments["safe_serialization"] = True
        return original(*bound.args, **bound.kwargs)

    model = wrapped("nf4")
    model.original_model_save_pretrained = model.save_pretrained
    model.save_pretrained = types.MethodType(unsloth_model_save_pretrained, model)
    model.save_pretrained(tmp_path, None)
    assert peftstate.verify_files(tmp_path).ok
    loaded = peft.PeftModel.from_pretrained(load_base("nf4"), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_unsloths_push(wrapped, monkeypatch):
    """It makes a function of the text of `push_to_hub`'s signature, and passes all by name.

    unsloth 2026.10.9, unsloth/save.py:8636-8698
    """
    pushed = {}

    def push_to_hub(self, repo_id, **kwargs):
        pushed.update(kwargs, repo_id=repo_id)

    monkeypatch.setattr(PushToHubMixin, "push_to_hub", push_to_hub)
    model = wrapped("bf16")
    signature = str(inspect.signature(model.push_to_hub)).replace("NoneType", "None")[1:]
    names: dict[str, types.FunctionType] = {}
    code = f"""
from typing import *
def unsloth_push_to_hub(self, {signature}:
    arguments = dict(locals())
    del arguments["self"]
    arguments["tags"] = ["unsloth",]
    assert arguments["token"] is None and arguments["private"] is None
    self.original_push_to_hub(**arguments)
"""
    exec(code, names)  # noqa: S102 - as there
    model.original_push_to_hub = model.push_to_hub
    model.push_to_hub = types.MethodType(names["unsloth_push_to_hub"], model)
    model.push_to_hub("user/adapter", commit_message="Trained")
    assert pushed["repo_id"] == "user/adapter"
    assert pushed["tags"] == ["unsloth"]
    assert pushed["commit_message"] == "Trained"
