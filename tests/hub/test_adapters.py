"""Adapters on the Hub: pushed, downloaded, pinned to one commit, and found offline in the cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from huggingface_hub.errors import RevisionNotFoundError
from peft import LoraConfig

import peftstate
from peftstate import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peftstate.errors import (
    AdapterNotFoundError,
    IntegrityError,
    MissingManifestWarning,
    SaveError,
    SignatureError,
)
from tests._tokenizers import make_tokenizer
from tests.conftest import IDS
from tests.hub.stub import etag_of

pytestmark = [
    # huggingface_hub 2, which hands httpx its files as it used to
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning"),
]

REPO = "user/adapter"
EXTRA = ("extra/adapter_config.json", "extra/adapter_model.safetensors", "extra/peftstate.json")
OWN = ("adapter_config.json", "adapter_model.safetensors", "peftstate.json", "peftstate.tensors")


def with_adapters(base: Any, *names: str, seed: int = 0) -> Any:
    """A model with adapters that change what it predicts."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """What a model predicts."""
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.fixture
def model(load_base, hub, client):
    """A model with two adapters, which has been pushed to the Hub."""
    model = with_adapters(load_base("bf16"), "default", "extra")
    model.push_to_hub(REPO)
    return model


def test_push(model, hub, tmp_path):
    """A push uploads all that a save writes, the folders of extra adapters included."""
    model.save_pretrained(tmp_path / "saved")
    files = hub.repo(REPO).files()
    assert {*OWN, *EXTRA} < files.keys()
    saved = {
        path.relative_to(tmp_path / "saved").as_posix()
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    }
    assert saved == files.keys()
    for name in ("adapter_model.safetensors", "extra/adapter_model.safetensors"):
        assert files[name] == (tmp_path / "saved" / name).read_bytes()


def test_push_with_all_that_a_save_takes(load_base, hub, client):
    """Tokenizer, probe and signature go up with the model, and hold when it comes down."""
    key = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
    model = with_adapters(load_base("bf16"), "default")
    model.push_to_hub(
        REPO,
        commit_message="With all",
        tokenizer=make_tokenizer(),
        prediction_probe=IDS,
        sign_with=key,
        fingerprint="sampled",
    )
    assert {*OWN, "model.sig", "tokenizer.json"} < hub.repo(REPO).files().keys()
    loaded = PeftModel.from_pretrained(load_base("bf16"), REPO, trusted_keys=[key.public_key()])
    assert torch.equal(logits(loaded), logits(model))
    sections = peftstate.read_manifest(REPO).sections
    assert {"tokenizer", "predictions"} <= sections.keys()
    assert sections["base_model"].fingerprint == "sampled"


def test_a_push_that_cannot_be_signed_uploads_nothing(
    load_base, hub, client, tmp_path, monkeypatch
):
    """The error is the save's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = with_adapters(load_base("bf16"), "default")
    with pytest.raises(SaveError, match=r"^The files cannot be signed: "):
        model.push_to_hub(REPO, sign_with=b"no key")
    assert set(hub.repo(REPO).files()) <= {"README.md", ".gitattributes"}


def test_push_to_a_branch(load_base, model, hub):
    """A push with a revision leaves the main branch alone."""
    other = with_adapters(load_base("bf16"), "default", seed=1)
    main = hub.repo(REPO).branches["main"]
    other.push_to_hub(REPO, revision="next")
    assert hub.repo(REPO).branches["main"] == main
    loaded = PeftModel.from_pretrained(load_base("bf16"), REPO, revision="next", adapters=())
    assert torch.equal(logits(loaded), logits(other))
    found = peftstate.read_manifest(REPO, revision="next").sections["adapters"].adapters
    assert found.keys() == {"default"}
    with pytest.raises(RevisionNotFoundError):
        PeftModel.from_pretrained(load_base("bf16"), REPO, revision="nothing")


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "no network"])
@pytest.mark.usefixtures("layout")
def test_load(model, load_base, hub, client, how):
    """What was loaded online once is loaded from the cache, extra adapters included."""
    for again in (False, True):
        options = {"local_files_only": True} if again and how == "local_files_only" else {}
        loaded = PeftModel.from_pretrained(load_base("bf16"), REPO, **options)
        assert loaded.peft_config.keys() == {"default", "extra"}
        for name in ("default", "extra"):
            for each in (model, loaded):
                each.set_adapter(name)
            assert torch.equal(logits(loaded), logits(model))
        model.set_adapter("default")
        assert peftstate.verify_files(REPO, **options).ok
        assert peftstate.read_manifest(REPO, **options).files.keys() == {*OWN[1::2], EXTRA[1]}
        if how == "HF_HUB_OFFLINE":
            client.go(online=False)
        elif how == "no network":
            client.lose_network()
        hub.asked.clear()
    assert hub.asked == []


def test_load_from_shared_blobs(model, load_base, client):
    """The blobs that repos share in the cache of huggingface_hub 2 are followed."""
    PeftModel.from_pretrained(load_base("bf16"), REPO)
    share_blobs(client.cache)
    client.go(online=False)
    loaded = PeftModel.from_pretrained(load_base("bf16"), REPO)
    assert torch.equal(logits(loaded), logits(model))
    assert peftstate.verify_files(REPO).ok


def share_blobs(cache: Path) -> None:
    """Move all blobs to where huggingface_hub 2 keeps those that repos share."""
    store = cache / "blobs"
    store.mkdir()
    (store / ".huggingface-shared-blobs").write_text("1\n")
    for number, blob in enumerate(sorted(cache.glob("models--*/blobs/*"))):
        shared = store / f"{number:02x}" / f"{number:02x}{'0' * 62}"
        shared.parent.mkdir()
        blob.rename(shared)
        blob.symlink_to(os.path.relpath(shared, blob.parent))


def test_auto(model, hub, client):
    """The auto class rebuilds the base model and loads the adapter, online and offline."""
    for online in (True, False):
        client.go(online=online)
        loaded = AutoPeftModelForCausalLM.from_pretrained(REPO)
        assert torch.equal(logits(loaded), logits(model))
    assert peftstate.base_model_kwargs(REPO)["dtype"] is torch.bfloat16


def test_load_adapter(model, load_base, client):
    """An adapter of the Hub is loaded into a live model, and its extra ones are not downloaded."""
    live = with_adapters(load_base("bf16"), "mine", seed=1)
    for online in (True, False):
        client.go(online=online)
        live.load_adapter(REPO, f"theirs{online}")
        live.set_adapter(f"theirs{online}")
        assert torch.equal(logits(live), logits(model))
    assert not list(client.cache.glob("**/snapshots/*/extra"))


def test_subfolder(model, load_base, client, tmp_path):
    """An adapter below the root of a repo is found, and so are the adapters below that."""
    model.save_pretrained(tmp_path / "saved")
    huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT).upload_folder(
        repo_id=REPO, folder_path=tmp_path / "saved", path_in_repo="nested"
    )
    for online in (True, False):
        client.go(online=online)
        loaded = PeftModel.from_pretrained(load_base("bf16"), REPO, subfolder="nested")
        assert loaded.peft_config.keys() == {"default", "extra"}
        assert torch.equal(logits(loaded), logits(model))
        assert peftstate.verify_files(REPO, subfolder="nested").ok
        auto = AutoPeftModelForCausalLM.from_pretrained(REPO, subfolder="nested")
        assert torch.equal(logits(auto), logits(model))
    snapshot = next(client.cache.glob("**/snapshots/*"))
    assert not (snapshot / "adapter_config.json").exists()


@pytest.mark.parametrize("auto", [False, True])
def test_a_branch_that_moves(model, load_base, hub, auto):
    """All files of a load are of one commit, also when somebody pushes in the midst of it."""
    first = dict(hub.repo(REPO).files())
    other = with_adapters(load_base("bf16"), "default", "extra", seed=1)
    other.push_to_hub(REPO)
    second = dict(hub.repo(REPO).files())
    assert first["adapter_model.safetensors"] != second["adapter_model.safetensors"]
    hub.repo(REPO).commit(first)

    hub.before_file = lambda _: hub.repo(REPO).commit(second)
    if auto:
        loaded = AutoPeftModelForCausalLM.from_pretrained(REPO)
    else:
        loaded = PeftModel.from_pretrained(load_base("bf16"), REPO)
    assert loaded.peft_config.keys() == {"default", "extra"}
    assert torch.equal(logits(loaded), logits(model))
    hub.before_file = lambda _: None
    assert torch.equal(logits(PeftModel.from_pretrained(load_base("bf16"), REPO)), logits(other))


def test_damage(model, load_base, hub):
    """A file on the Hub that somebody replaced is an integrity error."""
    files = dict(hub.repo(REPO).files())
    other = with_adapters(load_base("bf16"), "default", seed=1)
    other.push_to_hub("user/other")
    name = "adapter_model.safetensors"
    hub.repo(REPO).commit({**files, name: hub.repo("user/other").files()[name]})
    with pytest.raises(IntegrityError, match=name):
        PeftModel.from_pretrained(load_base("bf16"), REPO)
    assert not peftstate.verify_files(REPO).ok


def test_signature(model, load_base, hub, client, tmp_path):
    """With trusted keys, nothing but what was signed is taken from the Hub or from its cache."""
    key = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
    model.save_pretrained(tmp_path / "saved", sign_with=key)
    api = huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT)
    api.create_repo("user/signed")
    api.upload_folder(repo_id="user/signed", folder_path=tmp_path / "saved")
    trusted = [key.public_key()]
    for online in (True, False):
        client.go(online=online)
        loaded = PeftModel.from_pretrained(load_base("bf16"), "user/signed", trusted_keys=trusted)
        assert torch.equal(logits(loaded), logits(model))
        assert peftstate.verify_files("user/signed", trusted_keys=trusted).ok
    client.go(online=True)
    files = dict(hub.repo("user/signed").files())
    weights = files["extra/adapter_model.safetensors"]
    files["extra/adapter_model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    hub.repo("user/signed").commit(files)
    with pytest.raises(SignatureError, match="extra"):
        PeftModel.from_pretrained(load_base("bf16"), "user/signed", trusted_keys=trusted)
    with pytest.raises(SignatureError, match="there is no signature"):
        PeftModel.from_pretrained(load_base("bf16"), REPO, trusted_keys=trusted)


def test_without_a_manifest(load_base, hub, client, tmp_path):
    """An adapter that plain PEFT pushed is loaded with a warning, online and offline."""
    model = with_adapters(load_base("bf16"), "default")
    model.save_pretrained(tmp_path / "saved")
    names = OWN[:2]
    hub.repo(REPO, {name: (tmp_path / "saved" / name).read_bytes() for name in names})
    for online in (True, False):
        client.go(online=online)
        told = rf"^{REPO} at commit \w{{40}}: there is no peftstate manifest in the Hub's cache"
        with pytest.warns(MissingManifestWarning, match=told):
            loaded = PeftModel.from_pretrained(
                load_base("bf16"), REPO, autocast_adapter_dtype=False
            )
        assert torch.allclose(logits(loaded.eval()), logits(model), atol=0.1)


IN_PART = (
    r"^user/adapter: there is no such folder; the Hub's cache holds only some of the files|"
    r"adapter_model.safetensors: saved \d+ bytes, found no file in the Hub's cache\. "
    r"Load it once with the Hub in reach"
)
"""What huggingface_hub 2 knows, and what is seen of it otherwise."""


def test_a_part_in_the_cache(model, load_base, hub, client):
    """Offline, an adapter of whose files the cache lacks some is not loaded as if it were whole."""
    PeftModel.from_pretrained(load_base("bf16"), REPO)
    (snapshot,) = client.cache.glob("models--user--adapter/snapshots/*")
    (snapshot / "adapter_model.safetensors").unlink()
    client.go(online=False)
    with pytest.raises((AdapterNotFoundError, IntegrityError), match=IN_PART):
        PeftModel.from_pretrained(load_base("bf16"), REPO)
    client.go(online=True)
    PeftModel.from_pretrained(load_base("bf16"), REPO)


@pytest.mark.usefixtures("client", "model")
def test_no_weights_are_downloaded_to_read_the_manifest(hub):
    """What is small does for that; the rest is downloaded when it is needed."""
    hub.asked.clear()
    peftstate.read_manifest(REPO)
    peftstate.base_model_kwargs(REPO)
    assert set(hub.downloads()) == {"adapter_config.json", "peftstate.json"}
    assert peftstate.verify_files(REPO).ok
    # The config of the extra adapter is the same, so the cache has its content.
    assert {*OWN, *EXTRA[1:]} <= set(hub.downloads())


def test_names_of_the_stub():
    """The stub calls contents as git and Git LFS do."""
    assert etag_of("a.json", b"{}\n") == "0967ef424bce6791893e9a57bb952f80fd536e93"
    assert etag_of("a.tensors", b"").startswith("e3b0c44298fc1c149afbf4c8996fb924")
