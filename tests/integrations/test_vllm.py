"""The plugin of vLLM: which adapters it refuses, with stand-ins for vLLM's own classes.

`benchmarks/vllm.py` is the test against the real one, in an environment of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

from peftstate.errors import (
    AdapterMismatchError,
    EngineMismatchError,
    IntegrityError,
    ManifestError,
    NotServableError,
)
from peftstate.integrations import vllm as plugin
from tests._tokenizers import make_tokenizer

ROOT = Path(__file__).parents[2]


class Helper:
    """A stand-in for `vllm.lora.peft_helper.PEFTHelper`: reads the config of an adapter."""

    @classmethod
    def from_local_dir(cls, lora_path, max_position_embeddings):
        """What the original gives of a folder."""
        return cls, lora_path, max_position_embeddings


class Manager:
    """A stand-in for `vllm.lora.worker_manager.WorkerLoRAManager`: loads what it is asked to."""

    helper = Helper

    def __init__(self, vllm_config, device):  # noqa: ARG002 - the plugin takes it from here
        self.device = device

    def load(self, path):
        """As `_load_adapter` begins."""
        return self.helper.from_local_dir(str(path), 64)


@pytest.fixture
def engine(load_base):
    """Stand-ins with the plugin in place, and the config of an engine in float32."""
    helper = type("Helper", (Helper,), {"from_local_dir": vars(Helper)["from_local_dir"]})
    manager = type("Manager", (Manager,), {"__init__": Manager.__init__, "helper": helper})
    plugin.hook(helper, manager)
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(
            hf_config=load_base().config,
            dtype=torch.float32,
            quantization=None,
            model="elsewhere/base",
            tokenizer=None,
        ),
        lora_config=types.SimpleNamespace(lora_dtype=torch.float32, max_lora_rank=8),
    )
    return types.SimpleNamespace(
        config=config, manager=manager(config, "cpu"), helper=helper, kind=manager
    )


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    """Nothing that was verified, and no engine, is left from another test."""
    gc.collect()
    monkeypatch.setattr(plugin, "_verified", {})
    plugin._engines.clear()
    monkeypatch.delenv(plugin.REQUIRE_MANIFEST, raising=False)
    monkeypatch.delenv(plugin.ON_MISMATCH, raising=False)


@pytest.fixture
def save(load_base, with_lora, tmp_path):
    """Saves an adapter on a base model in float32: `save(**lora_config)` gives the folder."""

    def make(base=None, *, tokenizer=None, **fields):
        model = with_lora(base or load_base(), **fields)
        model.save_pretrained(tmp_path / "poet", tokenizer=tokenizer)
        return tmp_path / "poet"

    return make


def test_entry_point():
    """vLLM finds the plugin by the group that it looks in."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    target = declared["project"]["entry-points"]["vllm.general_plugins"]["peftstate"]
    module, _, name = target.partition(":")
    assert getattr(importlib.import_module(module), name) is plugin.register


def test_loads_what_fits(engine, save, caplog):
    """An adapter that fits is loaded by vLLM's own code, and the log says what was compared."""
    folder = save()
    with caplog.at_level(logging.INFO, "vllm.peftstate"):
        assert engine.manager.load(folder) == (engine.helper, str(folder), 64)
    assert engine.manager.device == "cpu"
    text = caplog.text
    assert "fits the engine (base_model, quantization, dtype, adapters)." in text
    assert "The base model's weights were not compared" in text
    assert "the engine's is elsewhere/base." in text


def test_changed_file(engine, save):
    """A file that changed is refused, also where it was verified before it changed."""
    folder = save()
    engine.manager.load(folder)
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"saved .*, found .*The file changed") as caught:
            engine.manager.load(folder)
        assert caught.value.file == str(weights)


def test_changed_config(engine, save):
    """So is another PEFT config: it is vLLM's only source of the factor."""
    folder = save()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 9}))
    with pytest.raises(AdapterMismatchError, match="lora_alpha: saved 8, found 9"):
        engine.manager.load(folder)


def test_verified_once(engine, save, monkeypatch):
    """Files that have not changed are not read again."""
    folder, calls = save(), []
    verify_files = plugin.verify_files
    monkeypatch.setattr(
        plugin, "verify_files", lambda path: calls.append(path) or verify_files(path)
    )
    engine.manager.load(folder)
    engine.manager.load(folder)
    assert len(calls) == 1
    (folder / "README.md").touch()
    engine.manager.load(folder)
    assert len(calls) == 2


def test_weights_that_vllm_would_prefer(engine, save, load_base, with_lora):
    """A file that vLLM takes before the saved one is refused."""
    folder = save()
    (folder / "adapter_model.safetensors").rename(folder / "other")
    with_lora(load_base()).save_pretrained(folder, safe_serialization=False)
    engine.manager.load(folder)
    (folder / "other").rename(folder / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match="weights that were not saved with it"):
        engine.manager.load(folder)


def test_save_that_did_not_finish(engine, save):
    """vLLM reads files by their plain names, so a save that is not there yet is refused."""
    folder = save()
    complete = folder / ".peftstate-complete"
    complete.mkdir()
    for name in ("peftstate.json", "adapter_model.safetensors"):
        (folder / name).rename(complete / name)
    with pytest.raises(IntegrityError, match="the files of a save that did not finish"):
        engine.manager.load(folder)


MISMATCHES = {
    "quantization": ("quantization.method: saved None, found 'fp8'", "model_config", "fp8"),
    "dtype": (
        "dtype.base.default: saved 'float32', found 'bfloat16'",
        "model_config",
        torch.bfloat16,
    ),
    "lora_dtype": (
        "dtype.adapters: saved 'float32', found 'float16'",
        "lora_config",
        torch.float16,
    ),
    "max_lora_rank": (
        "adapters.rank: saved 4, found '--max-lora-rank 1'",
        "lora_config",
        1,
    ),
}


@pytest.mark.parametrize("field", MISMATCHES)
def test_engine_that_does_not_fit(field, engine, save):
    """An engine that computes something else is refused, with what was saved and what it does."""
    message, part, value = MISMATCHES[field]
    setattr(getattr(engine.config, part), field, value)
    folder = save()
    with pytest.raises(EngineMismatchError) as caught:
        engine.manager.load(folder)
    assert str(caught.value) == (
        f"{folder}: 1 value differs from the saved state:\n  {message}\n"
        "Start the engine as `peftstate vllm-args` says, or load an adapter that fits this one."
    )
    assert not isinstance(caught.value, FileNotFoundError)  # in whose place vLLM puts its own


def test_other_base_model(engine, save, load_base):
    """Another config of the base model is refused; ids that trainers edit are not the model's."""
    base = load_base()
    base.config.rms_norm_eps = 0.5
    base.config.eos_token_id = 9
    folder = save(base)
    with pytest.raises(EngineMismatchError) as caught:
        engine.manager.load(folder)
    assert [mismatch.path for mismatch in caught.value.mismatches] == [
        "base_model.config.rms_norm_eps"
    ]


def test_other_architecture(engine, save):
    """So is another architecture."""
    engine.config.model_config.hf_config.architectures = ["MistralForCausalLM"]
    with pytest.raises(EngineMismatchError, match="model_class: saved 'LlamaForCausalLM', found"):
        engine.manager.load(save())


def test_half_precision(engine, save, load_base, caplog):
    """An adapter that vLLM must round is loaded, with a word about it."""
    engine.config.model_config.dtype = engine.config.lora_config.lora_dtype = torch.bfloat16
    engine.manager.load(save(load_base("bf16")))
    assert "the adapter was in float32; vLLM rounds it to bfloat16" in caplog.text


def test_what_vllm_lacks(engine, save):
    """What vLLM would pass over without a word is refused."""
    with pytest.raises(NotServableError, match="trainable_token_indices: vLLM passes over"):
        engine.manager.load(save(trainable_token_indices=[5]))


def test_tokenizer(engine, save, tmp_path, caplog):
    """A tokenizer on this machine is compared with the saved one."""
    folder = save(tokenizer=make_tokenizer())
    engine.config.model_config.tokenizer = str(folder)
    with caplog.at_level(logging.INFO, "vllm.peftstate"):
        engine.manager.load(folder)
    assert "dtype, adapters, tokenizer)." in caplog.text
    make_tokenizer(size=280).save_pretrained(tmp_path / "other")
    engine.config.model_config.tokenizer = str(tmp_path / "other")
    with pytest.raises(EngineMismatchError, match=r"tokenizer\.size: saved 300, found 280"):
        engine.manager.load(folder)


def test_policy(engine, save, caplog, monkeypatch):
    """What is to be done about a difference can be set in the environment, by section."""
    engine.config.model_config.dtype = engine.config.lora_config.lora_dtype = torch.float16
    folder = save()
    monkeypatch.setenv(plugin.ON_MISMATCH, "dtype=warn, tokenizer=ignore")
    engine.manager.load(folder)
    assert "dtype.base.default: saved 'float32', found 'float16'" in caplog.text
    monkeypatch.setenv(plugin.ON_MISMATCH, "dtypes=warn")
    with pytest.raises(ValueError, match=f"{plugin.ON_MISMATCH}: .* no section 'dtypes'"):
        engine.manager.load(folder)


def test_no_manifest(engine, save, caplog, monkeypatch):
    """An adapter without a manifest is loaded with a warning, or refused if that was asked for."""
    folder = save()
    (folder / "peftstate.json").unlink()
    engine.manager.load(folder)
    assert "there is no peftstate manifest; it is loaded unverified." in caplog.text
    monkeypatch.setenv(plugin.REQUIRE_MANIFEST, "1")
    with pytest.raises(ManifestError, match=plugin.REQUIRE_MANIFEST) as caught:
        engine.manager.load(folder)
    assert not isinstance(caught.value, FileNotFoundError)


def test_hooked_once(engine):
    """vLLM calls plugins more than once in a process, which changes nothing."""
    before = vars(engine.helper)["from_local_dir"], engine.kind.__init__
    plugin.hook(engine.helper, engine.kind)
    assert (vars(engine.helper)["from_local_dir"], engine.kind.__init__) == before


def test_engine_that_ended(engine, save):
    """An engine that is no more has no say."""
    engine.config.model_config.dtype = torch.float16
    folder, helper = save(), engine.helper
    del engine.manager
    gc.collect()
    helper.from_local_dir(str(folder), 64)


def test_vllm_that_is_not_known(monkeypatch):
    """A vLLM without the symbols that the plugin wraps does not start, and says why."""
    helper = type("PEFTHelper", (), {})
    with pytest.raises(RuntimeError, match=r"PEFTHelper\.from_local_dir .* is gone\)\. It knows"):
        plugin.hook(helper, Manager)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match="or leave adapters unverified by VLLM_PLUGINS"):
        plugin.register()
