"""SGLang, TGI and LoRAX: what their loaders find in our folder, and the check before they start.

They are not installed here. Each takes all files of a folder that look like weights:

- SGLang 0.5.23, `sglang/srt/lora/lora.py:143-156`: ``*.safetensors``, else ``*.bin``;
- TGI db931fc, `server/text_generation_server/utils/hub.py:46-59`: every ``*.safetensors``;
- LoRAX a7394ba: the same by `source.weight_files()`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import peftstate
from peftstate._ranks import save_rank
from peftstate.sections._view import ModelView
from tests._tokenizers import make_tokenizer

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, load_base, with_lora):
    """An adapter's folder with all that a save can put there."""
    folder = tmp_path_factory.mktemp("served") / "adapter"
    model = with_lora(load_base("nf4"))
    model.add_adapter("more", model.peft_config["default"])
    model.get_base_model().model.norm.weight.data += 1  # goes to the sidecar
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        patch.setenv("WORLD_SIZE", "2")
        save_rank(ModelView.of(model), folder)
        patch.setenv("RANK", "0")
        model.save_pretrained(
            folder,
            tokenizer=make_tokenizer(chat_template="{{ messages }}"),
            prediction_probe=True,
        )
    peftstate.sign(folder, Ed25519PrivateKey.generate())
    return folder


def verified(folder):
    """`peftstate verify`, as an init container runs it, and whether it imported torch."""
    code = (
        "import sys; from peftstate.cli.app import app\n"
        "try: app()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "verify", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.mark.parametrize("name", [".", "more"])
def test_one_file_of_weights(folder, name):
    """The only file that their loaders take for weights holds LoRA's, and nothing else."""
    found = [path.name for pattern in WEIGHTS for path in (folder / name).glob(pattern)]
    assert found == ["adapter_model.safetensors"]
    tensors = safetensors.torch.load_file(folder / name / found[0])
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
    assert not (folder / name / "config.json").exists()
    assert (folder / name / "peftstate.rank-00001-of-00002.tensors").exists()


def test_the_config_has_what_they_read(folder):
    """The fields that SGLang, TGI and LoRAX take from it are PEFT's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"base_model_name_or_path", "r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["peft_type"] == "LORA"


def test_the_check_before_they_start(folder, tmp_path):
    """Exit code 0 lets the server start, 1 and 3 do not; it needs no torch."""
    done = verified(folder)
    assert (done.returncode, done.stderr) == (0, "False\n")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert verified(damaged).returncode == 1
    (damaged / "peftstate.json").unlink()
    assert verified(damaged).returncode == 3


def test_what_tgi_leaves_in_a_folder_is_told(folder, tmp_path):
    """Started on an adapter's folder, TGI writes the merged model into it.

    `AutoModelForCausalLM.from_pretrained` would then apply the adapter twice.
    """
    merged = shutil.copytree(folder, tmp_path / "merged")
    (merged / "config.json").write_text("{}")
    safetensors.torch.save_file({"w": torch.zeros(1)}, merged / "model.safetensors")
    done = verified(merged)
    assert "note: model.safetensors: weights of a whole model beside adapter_c" in done.stdout
