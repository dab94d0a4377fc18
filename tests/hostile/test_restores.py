"""What restoring a hostile value would do, where a whole hostile folder is not needed to see it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import attrs
import peft
import pytest
import torch

import peftstate
from peftstate.errors import AdapterLoadError, AdapterMismatchError, SaveError
from peftstate.manifest import FileRecord, Manifest
from peftstate.sections import implementation
from peftstate.sections._quantized_weights import QuantizedWeight
from peftstate.sections._tensors import SidecarTensor


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("change", ["short", "other dtype"])
def test_quantized_weight_that_does_not_fit(kind: str, change: str, load_base: Any) -> None:
    """A quantized weight is put back only with the shapes and dtypes of the layer's own.

    The kernels take the shape from the layer and would read beyond a shorter tensor.
    """
    module = load_base(kind).get_submodule("model.layers.0.self_attn.q_proj")
    saved = QuantizedWeight.of("x", module)
    saved.put_back(module)
    for key, record in saved.tensors.items():
        tensor = record.load()
        if tensor.dim() == 0 and change == "short":
            continue
        bad = tensor[: len(tensor) // 2] if change == "short" else tensor.double()
        tensors = {**saved.tensors, key: SidecarTensor.of(key, bad)}
        before = copy.deepcopy(module.weight)
        with pytest.raises(ValueError, match=f"the saved weight's {key} is "):
            attrs.evolve(saved, tensors=tensors).put_back(module)
        assert torch.equal(module.weight.data, before.data)


def test_prompt_does_not_load_a_tokenizer(
    tmp_path: Path, load_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No manifest has a prompt made anew by the tokenizer, and its code, that the config names.

    Older versions of PEFT pass ``tokenizer_kwargs={"trust_remote_code": True}`` on to transformers.
    """
    import transformers

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tokenizer was loaded")

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peftstate.get_peft_model(load_base(), config)
    model.save_pretrained(tmp_path)

    from benchmarks._hostile.case import section, with_config

    def edit(fields: dict[str, Any]) -> None:
        fields.update(
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="x",
            tokenizer_name_or_path="evil/tokenizer",
            tokenizer_kwargs={"trust_remote_code": True},
        )

    def more(record: dict[str, Any]) -> None:
        tensors = record["adapters"]["default"]
        state = {"tensor": "rng.numpy", "dtype": "int64", "shape": [624], "digest": numpy}
        tensors["prompt_encoder.evil"] = state

    manifest = peftstate.read_manifest(tmp_path)
    numpy = manifest.sections["rng"].numpy.state.digest
    with_config(edit)(tmp_path)
    section("extra_tensors", more)(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(AdapterMismatchError, match=r"prompt_encoder\.evil"):
        peftstate.PeftModel.from_pretrained(load_base(), tmp_path)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "grouped_mm"])
def test_is_installed(name: str) -> None:
    """What is in torch or transformers can always be set."""
    assert implementation.is_installed(name)


@pytest.mark.parametrize("name", sorted(implementation.ATTENTION))
def test_no_kernel_in_place_of_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package that is missing, no kernel is taken from the Hub, though transformers would."""
    from transformers.utils import import_utils

    for version in (2, 3, 4):
        monkeypatch.setattr(
            import_utils, f"is_flash_attn_{version}_available", lambda: False, raising=False
        )
    assert implementation.is_installed(name) == (not name.startswith("flash_"))


def _with_files(*names: str) -> Manifest:
    """A manifest, which need not be one of any model, that lists files."""
    return Manifest(sections={}, files={name: FileRecord(size=1, sha256="0") for name in names})


def test_manifest_that_no_load_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that is too large, or has names that no load takes, is not written."""
    assert _with_files("a", "b").to_json()
    with pytest.raises(ValueError, match="'a' and 'A' are the same name"):
        _with_files("a", "A").to_json()
    with pytest.raises(ValueError, match="is longer than 4096 characters"):
        _with_files("a" * 5000).to_json()
    monkeypatch.setattr("peftstate.manifest.MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"would have \d+ bytes; it may have 100"):
        _with_files("a").to_json()


def test_save_that_no_load_would_take(
    tmp_path: Path, load_base: Any, with_lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a save fails, and what PEFT saves is rescued."""
    model = with_lora(load_base())
    monkeypatch.setattr("peftstate.manifest.MAX_BYTES", 100)
    with pytest.raises(SaveError, match="the manifest would have") as caught:
        model.save_pretrained(tmp_path / "adapter")
    assert caught.value.rescued is not None
    assert Path(caught.value.rescued, "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("allowed", "library", "refused"),
    [
        (None, "transformers", False),
        (None, "transformers.models.llama.modeling_llama", False),
        (None, "transformers_evil", True),
        (None, "os", True),
        (["mine"], "mine.models", False),
        (["mine"], "transformers", True),
    ],
)
def test_base_class(allowed: list[str] | None, library: str, *, refused: bool) -> None:
    """The base model's class comes from a list of packages, or from those that the caller names."""
    from peftstate._peft_config import refuse_base_class

    config: Any = {"auto_mapping": {"parent_library": library, "base_model_class": "A"}}
    refuse_base_class({**config, "task_type": "CAUSAL_LM"}, allowed)  # then PEFT imports nothing
    if not refused:
        refuse_base_class(config, allowed)
        return
    with pytest.raises(AdapterLoadError, match=f"imported from '{library}'"):
        refuse_base_class(config, allowed)
