"""Base models from the Hub: what its cache knows of them is recorded, and pins them."""

from __future__ import annotations

import hashlib
import shutil
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig

import peftstate
from peftstate import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peftstate.errors import BaseModelMismatchError
from peftstate.sections._hub_cache import cached_checkpoint
from tests.hub.test_adapters import logits, share_blobs

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning"),
]

BASE = "user/base"
WEIGHTS = "model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(**options: Any) -> Any:
    """The base model as the cache has it."""
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16, **options)


def adapted(base: Any, **options: Any) -> Any:
    """The base model with an adapter."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(base, config, **options).eval()


@pytest.fixture
def old(hub, client, causal_lm):
    """The commit of the base model on the Hub, which is in the cache."""
    commit = hub.repo(BASE, contents(causal_lm)).branches["main"]
    huggingface_hub.snapshot_download(BASE)
    return commit


@pytest.fixture
def move(hub, causal_lm, tmp_path):
    """Has somebody push other weights, which are then downloaded, too."""

    def push():
        model = transformers.AutoModelForCausalLM.from_pretrained(causal_lm)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        model.bfloat16().save_pretrained(tmp_path / "new")
        commit = hub.repo(BASE).commit(contents(tmp_path / "new"))
        huggingface_hub.snapshot_download(BASE)
        return commit

    return push


def checkpoint() -> Any:
    """What is said of the checkpoint of the base model."""
    return cached_checkpoint(types.SimpleNamespace(_name_or_path=BASE), None)


def test_recorded(old, causal_lm, tmp_path, client):
    """The commit and the SHA-256 of the weights are in the manifest, and are the file's own."""
    adapted(load()).save_pretrained(tmp_path / "saved")
    record = peftstate.read_manifest(tmp_path / "saved").sections["base_model"]
    sha256 = hashlib.sha256((causal_lm / WEIGHTS).read_bytes()).hexdigest()
    assert (record.name, record.commit, record.files) == (BASE, old, {WEIGHTS: sha256})


def test_weights_are_not_read(old, client):
    """Nothing but the name of the link is looked at: the blob need not be there."""
    before = checkpoint()
    (snapshot,) = client.cache.glob("models--user--base/snapshots/*")
    (snapshot / WEIGHTS).resolve().unlink()
    assert checkpoint() == before
    assert before.files[WEIGHTS] is not None


def test_one_link_is_followed(old, client):
    """The name of a shared blob, which is another hash, is not taken for a SHA-256."""
    before = checkpoint()
    share_blobs(client.cache)
    (snapshot,) = client.cache.glob("models--user--base/snapshots/*")
    assert len((snapshot / WEIGHTS).resolve().name) == 64  # so it could be
    assert (snapshot / WEIGHTS).resolve().name != before.files[WEIGHTS]
    assert checkpoint() == before


def test_without_links(old, client):
    """A cache as on Windows tells the commit alone."""
    (snapshot,) = client.cache.glob("models--user--base/snapshots/*")
    blob = (snapshot / WEIGHTS).resolve()
    (snapshot / WEIGHTS).unlink()
    shutil.move(blob, snapshot / WEIGHTS)
    assert checkpoint().commit == old
    assert checkpoint().files == {WEIGHTS: None}


def test_files_that_count(old, client):
    """Of the kinds of weights in a snapshot only the one that transformers takes is recorded."""
    (snapshot,) = client.cache.glob("models--user--base/snapshots/*")
    blob = (snapshot / WEIGHTS).readlink()
    (snapshot / "pytorch_model.bin").symlink_to(blob)
    assert checkpoint().files.keys() == {WEIGHTS}
    (snapshot / WEIGHTS).unlink()
    assert checkpoint().files == {"pytorch_model.bin": blob.name}
    small = snapshot / "pytorch_model.bin"
    small.unlink()
    small.symlink_to(f"../../blobs/{'0' * 40}")  # kept in git, under a hash of another kind
    assert checkpoint().files == {"pytorch_model.bin": None}


def test_the_saved_commit_is_loaded(old, move, tmp_path, client):
    """The auto class loads the base model as it was, though its branch has moved on."""
    model = adapted(load())
    model.save_pretrained(tmp_path / "saved")
    new = move()
    assert new != old
    for online in (True, False):
        client.go(online=online)
        assert peftstate.base_model_kwargs(tmp_path / "saved")["revision"] == old
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(loaded), logits(model))


def test_another_commit_is_told(old, move, tmp_path, client):
    """Where the weights differ, the error says of which commits they are."""
    adapted(load()).save_pretrained(tmp_path / "saved")
    saved = checkpoint()
    new = move()
    with pytest.raises(BaseModelMismatchError) as caught:
        PeftModel.from_pretrained(load(), tmp_path / "saved")
    found = {str(each.field): (each.saved, each.found) for each in caught.value.mismatches}
    assert found.pop("commit") == (old, new)
    key = f"files[{WEIGHTS}]"
    assert found.pop(key) == (saved.files[WEIGHTS], checkpoint().files[WEIGHTS])
    assert found.keys() == {"tensors[lm_head.weight].digest"}


def test_another_commit_of_the_same_weights(old, hub, load_base, tmp_path, client):
    """A commit that changed no weights is the same model, and so is a copy on the disk."""
    model = adapted(load())
    model.save_pretrained(tmp_path / "saved")
    files = {**hub.repo(BASE).files(), "README.md": b"# New"}
    hub.repo(BASE).commit(files)
    huggingface_hub.snapshot_download(BASE)
    assert checkpoint().commit != old
    for base in (load(), load_base("bf16")):
        loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
        assert torch.equal(logits(loaded), logits(model))


def test_revision(old, move, hub, tmp_path, client):
    """The commit of the revision that PEFT was told is recorded, and loaded when a tag moved."""
    new = move()
    hub.repo(BASE).branches["v1"] = old
    huggingface_hub.snapshot_download(BASE, revision="v1")
    model = adapted(load(revision="v1"), revision="v1")
    model.save_pretrained(tmp_path / "saved")
    record = peftstate.read_manifest(tmp_path / "saved").sections["base_model"]
    assert (record.revision, record.commit) == ("v1", old)
    hub.repo(BASE).branches["v1"] = new
    huggingface_hub.snapshot_download(BASE, revision="v1")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
