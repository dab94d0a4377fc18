"""Signed folders: what a signature covers, and that nothing else is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import peftstate
from peftstate import errors
from peftstate._folder import AdapterFolder, open_folder
from peftstate._keys import key_id
from peftstate._storage import COMPLETE_NAME, MANIFEST_NAME, SIGNATURE_NAME, staged, write_file
from peftstate.manifest import Manifest
from tests._tokenizers import make_tokenizer
from tests.test_folder import COMMIT, REPO, in_cache
from tests.test_keys import private_pem, public_pem

pytestmark = pytest.mark.filterwarnings("ignore::peftstate.errors.TrainModeWarning")

GOLDEN = Path(__file__).parent / "golden" / "schema-1"
BY_MODEL_SIGNING = Path(__file__).parent / "golden" / "model-signing-1.1.1"
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
ID, OTHER_ID = (key_id(key.public_key()) for key in (KEY, OTHER))
TRUSTED = [KEY.public_key()]

NO_SIGNATURE = (
    "there is no signature, and only what a trusted key has signed is to be loaded. "
    "Sign the folder with peftstate.sign(path, key), or load it without trusted_keys."
)
NOT_COVERED = (
    "the file is not covered by the signature. Remove it, or have the folder signed again if it "
    "belongs there."
)
MISSING = "the file was signed, and is missing. Get the folder anew from its author."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A signed folder with a tokenizer in it."""
    shutil.copytree(GOLDEN / "causal-lm", tmp_path / "adapter")
    assert peftstate.sign(tmp_path / "adapter", KEY) == ID
    return tmp_path / "adapter"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A signed folder with a second adapter in a sub-folder."""
    shutil.copytree(GOLDEN / "two-adapters", tmp_path / "two")
    peftstate.sign(tmp_path / "two", KEY)
    return tmp_path / "two"


def subfolder_of(folder: Path) -> Path:
    """The folder of the second adapter."""
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def refused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Path, str]:
    """The path and the reason with which something is refused for its signature."""
    with pytest.raises(errors.SignatureError) as caught:
        function(*args, **kwargs)
    return Path(caught.value.path), caught.value.reason


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their names, those below it included."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- what is covered


def test_signed_folder(folder: Path) -> None:
    """A signed folder is verified, with one key of several, and its manifest is read."""
    keys = [OTHER.public_key(), *TRUSTED]
    assert peftstate.verify_signature(folder, keys) == ID
    assert peftstate.verify_files(folder, trusted_keys=keys).ok
    assert peftstate.read_manifest(folder, trusted_keys=keys) == peftstate.read_manifest(folder)
    assert peftstate.base_model_kwargs(folder, trusted_keys=keys) == peftstate.base_model_kwargs(
        folder
    )


def test_signing_adds_one_file(folder: Path) -> None:
    """Signing leaves the files as they are, and signing again gives the same signature."""
    expected = files_of(GOLDEN / "causal-lm")
    found = files_of(folder)
    assert {name: data for name, data in found.items() if name != SIGNATURE_NAME} == expected
    peftstate.sign(folder, KEY)
    assert files_of(folder) == found


COVERED = sorted(path.name for path in (GOLDEN / "causal-lm").iterdir() if path.name != "README.md")


@pytest.mark.parametrize("name", COVERED)
def test_each_file_counts(folder: Path, name: str) -> None:
    """A file that was changed or removed is refused by its name, whichever it is."""
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    path, reason = refused(peftstate.verify_signature, folder, TRUSTED)
    assert path == folder / name
    assert reason.startswith("the file is not the one that was signed: signed SHA-256 ")
    assert reason.endswith(". Do not load the folder; get it anew from its author.")
    (folder / name).unlink()
    assert refused(peftstate.verify_signature, folder, TRUSTED) == (folder / name, MISSING)


ADDED = [
    "adapter_model.bin",
    "model.safetensors",
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "modeling_evil.py",
    "additional_chat_templates/tool_use.jinja",
    ".hidden",
]


@pytest.mark.parametrize("name", ADDED)
def test_added_files(folder: Path, name: str) -> None:
    """A file that was added is refused, for somebody may load it; signing it takes it in."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert refused(peftstate.verify_signature, folder, TRUSTED) == (folder / name, NOT_COVERED)
    assert refused(peftstate.verify_files, folder, trusted_keys=TRUSTED)[1] == NOT_COVERED
    peftstate.sign(folder, KEY)
    assert peftstate.verify_signature(folder, TRUSTED) == ID
    (folder / name).write_text("[]")
    assert refused(peftstate.verify_signature, folder, TRUSTED)[0] == folder / name


def test_name_of_an_added_file(folder: Path) -> None:
    """A file's name reaches no terminal as a command to it."""
    (folder / "\x1b[2J").write_text("")
    with pytest.raises(errors.SignatureError) as caught:
        peftstate.verify_signature(folder, TRUSTED)
    assert "\\x1b[2J: the file is not covered" in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match="has a control character"):
        peftstate.sign(folder, KEY)


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "checkpoint-5/weights.bin"])
def test_files_that_do_not_count(folder: Path, name: str) -> None:
    """People edit the model card, and other folders are signed by themselves if at all."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("changed")
    assert peftstate.verify_signature(folder, TRUSTED) == ID


def test_link_to_elsewhere(folder: Path, tmp_path: Path) -> None:
    """A file that is a link out of the folder is refused, even to the same bytes."""
    shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(errors.IntegrityError, match="a link to"):
        peftstate.verify_signature(folder, TRUSTED)


# --- signatures that are not good


def test_no_signature(folder: Path) -> None:
    """A folder without a signature is refused, and the error says how to come by one."""
    (folder / SIGNATURE_NAME).unlink()
    for function in FUNCTIONS:
        assert refused(function, folder, trusted_keys=TRUSTED) == (
            folder / SIGNATURE_NAME,
            NO_SIGNATURE,
        )


FUNCTIONS = (
    peftstate.verify_signature,
    peftstate.verify_files,
    peftstate.read_manifest,
    peftstate.base_model_kwargs,
)


def test_unknown_key(folder: Path) -> None:
    """A folder that somebody else has signed is refused with the key's id."""
    path, reason = refused(peftstate.verify_signature, folder, [OTHER.public_key()])
    assert path == folder / SIGNATURE_NAME
    assert reason.startswith(f"it was made with key {ID}, which is not trusted; ")


def test_no_manifest(folder: Path) -> None:
    """Without its manifest a folder is refused, whether or not the signature knows of one."""
    (folder / MANIFEST_NAME).unlink()
    assert refused(peftstate.verify_signature, folder, TRUSTED) == (folder / MANIFEST_NAME, MISSING)
    from peftstate._digest import file_digest
    from peftstate._envelope import signature_file

    files = {
        name: file_digest(data) for name, data in files_of(folder).items() if name != SIGNATURE_NAME
    }
    data = signature_file(files, KEY, name="adapter", ignored=())
    (folder / SIGNATURE_NAME).write_bytes(data)
    assert refused(peftstate.verify_signature, folder, TRUSTED) == (
        folder / SIGNATURE_NAME,
        (
            "what was signed has no peftstate manifest, so nothing of the model's state could be "
            "verified. Save the model with peftstate, and sign the folder again."
        ),
    )


def test_large_signature(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature file that is larger than any real one is refused before it is read."""
    from peftstate import _signature

    monkeypatch.setattr(_signature, "MAX_BYTES", (folder / SIGNATURE_NAME).stat().st_size - 1)
    with pytest.raises(errors.IntegrityError, match=r"model\.sig: saved at most \d+ bytes"):
        peftstate.verify_signature(folder, TRUSTED)


def test_resealed_manifest(folder: Path) -> None:
    """Somebody without the key can write a manifest with a good seal, and is found out."""
    path = folder / MANIFEST_NAME
    manifest = Manifest.from_json(path.read_bytes(), path="")
    path.write_bytes(attrs.evolve(manifest, peftstate_version="9").to_json())
    assert peftstate.verify_files(folder).ok
    assert refused(peftstate.verify_files, folder, trusted_keys=TRUSTED)[0] == path


def test_files_of_two_signed_folders(folder: Path, tmp_path: Path) -> None:
    """Files of different folders that one key has signed do not make a signed folder."""
    other = tmp_path / "other"
    shutil.copytree(GOLDEN / "classifier", other)
    peftstate.sign(other, KEY)
    for name in ("adapter_model.safetensors", MANIFEST_NAME, SIGNATURE_NAME):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(folder, mixed)
        shutil.copyfile(other / name, mixed / name)
        refused(peftstate.verify_signature, mixed, TRUSTED)


# --- folders of several adapters


def test_each_folder_is_signed(two: Path, tmp_path: Path) -> None:
    """The folder of an extra adapter is signed by itself too, and stays so when it is moved."""
    inner = subfolder_of(two)
    assert peftstate.verify_signature(two, TRUSTED) == ID
    moved = shutil.move(inner, tmp_path / "moved")
    assert peftstate.verify_signature(moved, TRUSTED) == ID
    path, reason = refused(peftstate.verify_signature, two, TRUSTED)
    assert path.parent == inner
    assert reason == MISSING


def test_files_in_an_adapters_subfolder_count(two: Path) -> None:
    """The root's signature covers the folders of its adapters."""
    inner = subfolder_of(two)
    for name in ("tokenizer.json", "adapter_model.bin"):
        (inner / name).write_text("{}")
        assert refused(peftstate.verify_signature, two, TRUSTED) == (inner / name, NOT_COVERED)
        (inner / name).unlink()
    (inner / "adapter_config.json").write_text("{}")
    assert refused(peftstate.verify_signature, two, TRUSTED)[0] == inner / "adapter_config.json"


# --- signing


def test_damaged_folders_are_not_signed(folder: Path) -> None:
    """What is not as it was saved, or has no manifest, is not signed, and stays as it is."""
    (folder / SIGNATURE_NAME).unlink()
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    before = files_of(folder)
    with pytest.raises(errors.IntegrityError):
        peftstate.sign(folder, KEY)
    assert files_of(folder) == before
    weights.write_bytes(data)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(errors.ManifestNotFoundError):
        peftstate.sign(folder, KEY)
    with pytest.raises(errors.ManifestNotFoundError):
        peftstate.sign(folder / "missing", KEY)
    assert not (folder / "missing").exists()


def test_sign_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is given as the working directory is called by its name."""
    monkeypatch.chdir(folder)
    before = files_of(folder)
    peftstate.sign(".", KEY)
    assert files_of(folder) == before
    assert peftstate.verify_signature(".", TRUSTED) == ID


def test_signature_is_like_other_files(folder: Path) -> None:
    """Servers of other users can read it."""
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / SIGNATURE_NAME).stat().st_mode & 0o777 == 0o666 & ~umask


# --- saves and readers at work


def test_save_that_was_not_moved_to_the_end(folder: Path) -> None:
    """A folder whose files wait to be moved is verified where they are."""
    (folder / COMPLETE_NAME).mkdir()
    for name in (*COVERED, SIGNATURE_NAME):
        shutil.copyfile(folder / name, folder / COMPLETE_NAME / name)
        (folder / name).write_text("older")
    assert peftstate.verify_signature(folder, TRUSTED) == ID
    (folder / COMPLETE_NAME / "tokenizer.json").write_text("{}")
    refused(peftstate.verify_signature, folder, TRUSTED)


def test_read_between_saves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that meets a save reads again, signature and all."""
    read = AdapterFolder.read
    older = Manifest.from_json((folder / MANIFEST_NAME).read_bytes(), path="")
    newer = attrs.evolve(older, peftstate_version="9")
    saves = iter([newer])

    def and_then_saved(self: AdapterFolder, name: str, **limits: Any) -> memoryview:
        data = read(self, name, **limits)
        if name == SIGNATURE_NAME and (manifest := next(saves, None)):
            (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
            monkeypatch.setattr(AdapterFolder, "read", read)
            peftstate.sign(folder, KEY)
        return data

    monkeypatch.setattr(AdapterFolder, "read", and_then_saved)
    assert peftstate.read_manifest(folder, trusted_keys=TRUSTED) == newer


def test_nothing_is_read_without_the_signature(folder: Path) -> None:
    """A folder that is to be signed gives no file before its signature was verified."""
    from peftstate._signature import open_for_load

    opened = open_for_load(folder, trusted_keys=TRUSTED)
    with pytest.raises(AssertionError):
        opened.read_bytes(MANIFEST_NAME)
    assert open_folder(folder).read_bytes(MANIFEST_NAME)


def test_unsigned_replacement(folder: Path) -> None:
    """A folder that was signed and then written by another saver is refused."""
    with staged(folder) as staging:
        write_file(staging / "tokenizer.json", b"{}")
    assert refused(peftstate.verify_signature, folder, TRUSTED)[0] == folder / "tokenizer.json"


# --- the Hub


def test_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repo on the Hub all that is signed is downloaded, of the same commit, and verified."""
    contents = {name: data.decode("latin-1") for name, data in files_of(folder).items()}
    asked: list[tuple[str | None, list[str]]] = []
    cache = tmp_path / "cache"

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append((revision, allow_patterns))
        wanted = {name: text for name, text in contents.items() if name in allow_patterns}
        shutil.rmtree(cache, ignore_errors=True)
        in_cache(cache, wanted)
        snapshot = cache / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT
        for name in wanted:
            (snapshot / name).resolve().write_bytes(contents[name].encode("latin-1"))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert peftstate.verify_signature(REPO, TRUSTED) == ID
    assert [revision for revision, _ in asked] == [None, COMMIT]
    assert "tokenizer.json" not in asked[0][1]
    assert {*COVERED} <= {*asked[1][1]}
    contents["tokenizer.json"] += " "
    assert refused(peftstate.verify_signature, REPO, TRUSTED)[0].name == "tokenizer.json"
    del contents["tokenizer.json"]
    assert refused(peftstate.verify_signature, REPO, TRUSTED)[1] == MISSING
    del contents[SIGNATURE_NAME]
    assert refused(peftstate.verify_signature, REPO, TRUSTED)[1] == NO_SIGNATURE


# --- OpenSSF model signing


def test_signed_by_model_signing(tmp_path: Path) -> None:
    """A folder that `model_signing sign key` has signed is verified, and refused when changed."""
    shutil.copytree(GOLDEN / "causal-lm", tmp_path / "adapter")
    shutil.copyfile(BY_MODEL_SIGNING / SIGNATURE_NAME, tmp_path / "adapter" / SIGNATURE_NAME)
    keys = [BY_MODEL_SIGNING / "key.pub"]
    peftstate.verify_signature(tmp_path / "adapter", keys)
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    refused(peftstate.verify_signature, tmp_path / "adapter", keys)


def test_verified_by_model_signing(tmp_path: Path) -> None:
    """`model_signing verify key` verifies what is signed here with ECDSA, sub-folders included."""
    pytest.importorskip("model_signing", reason="it is no dependency; docs/signing.md says more")
    pytest.importorskip("OpenSSL", reason="model-signing 1.1.1 needs it and does not say so")
    import model_signing.verifying

    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pub").write_bytes(public_pem(key))
    for name in ("causal-lm", "two-adapters"):
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder)
        (folder / "checkpoint-5").mkdir()
        (folder / "checkpoint-5" / "a").write_text("a")
        peftstate.sign(folder, key)
        for place in [folder, *(path.parent for path in folder.glob("*/peftstate.json"))]:
            verifying = model_signing.verifying.Config()
            verifying.use_elliptic_key_verifier(public_key=tmp_path / "key.pub")
            verifying.verify(place, place / SIGNATURE_NAME)
        (folder / "adapter_config.json").write_text("{}")
        verifying = model_signing.verifying.Config()
        verifying.use_elliptic_key_verifier(public_key=tmp_path / "key.pub")
        with pytest.raises(ValueError, match="Hash mismatch"):
            verifying.verify(folder, folder / SIGNATURE_NAME)


def test_light(folder: Path, tmp_path: Path) -> None:
    """Signing and verifying import neither torch nor peft."""
    (tmp_path / "key.pem").write_bytes(private_pem(KEY))
    (tmp_path / "key.pub").write_bytes(public_pem(KEY))
    code = """
import sys
import peftstate
folder, private, public = sys.argv[1:]
assert peftstate.sign(folder, private) == peftstate.verify_signature(folder, [public])
assert peftstate.verify_files(folder, trusted_keys=[public]).ok
print(*{"torch", "numpy", "peft", "safetensors", "transformers"} & sys.modules.keys())
"""
    arguments = [folder, tmp_path / "key.pem", tmp_path / "key.pub"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


# --- with models


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    import transformers

    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def base(base_path: Path) -> Callable[[], Any]:
    """Loads the tiny model."""
    import transformers

    return lambda: transformers.LlamaForCausalLM.from_pretrained(base_path)


@pytest.fixture
def model(base: Any, with_lora: Any) -> Any:
    """A model with an adapter, in eval mode."""
    return with_lora(base()).eval()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """The signed folder of `model`, with a tokenizer."""
    model.save_pretrained(tmp_path / "saved", sign_with=KEY, tokenizer=make_tokenizer())
    return tmp_path / "saved"


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """A copy of what is trained in a model."""
    return {name: value.clone() for name, value in model.named_parameters() if "lora_" in name}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two copies are equal to the last bit."""
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def loads(base: Any, model: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every way in which a folder is loaded, by its name."""
    yield "PeftModel", lambda path, **kw: peftstate.PeftModel.from_pretrained(base(), path, **kw)
    yield "AutoPeftModel", peftstate.AutoPeftModelForCausalLM.from_pretrained
    yield "load_adapter", lambda path, **kw: model.load_adapter(path, "more", **kw)
    yield "restore", lambda path, **kw: peftstate.restore(model, path, **kw)
    yield "verify", lambda path, **kw: peftstate.verify(model, path, **kw)


def test_signed_load(base: Any, model: Any, saved: Path) -> None:
    """A signed folder is loaded in every way, and the model is the one that was saved."""
    assert peftstate.verify_signature(saved, TRUSTED) == ID
    for name, load in loads(base, model):
        loaded = load(saved, trusted_keys=iter(TRUSTED))
        if name in ("PeftModel", "AutoPeftModel"):
            assert equal(parameters(loaded), parameters(model))
    assert "more" in model.peft_config


@pytest.mark.parametrize(
    "change", ["signature", "manifest", "key", "weights", "config", "tokenizer", "added"]
)
def test_refused_load(base: Any, model: Any, saved: Path, change: str) -> None:
    """What is not signed is loaded in no way, not even as plain PEFT would; the model stays."""
    keys = [OTHER.public_key()] if change == "key" else TRUSTED
    if change in ("signature", "manifest"):
        (saved / {"signature": SIGNATURE_NAME, "manifest": MANIFEST_NAME}[change]).unlink()
    if change == "weights":
        data = bytearray((saved / "adapter_model.safetensors").read_bytes())
        data[-1] ^= 1
        (saved / "adapter_model.safetensors").write_bytes(data)
    if change == "config":
        text = (saved / "adapter_config.json").read_text()
        (saved / "adapter_config.json").write_text(
            text.replace('"lora_alpha": 8', '"lora_alpha":8')
        )
        assert (saved / "adapter_config.json").read_text() != text
    if change == "tokenizer":
        (saved / "tokenizer_config.json").write_text("{}")
    if change == "added":
        (saved / "adapter_model.bin").write_bytes(b"")
    before = parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, load in loads(base, model):
            refused(load, saved, trusted_keys=keys)
    assert equal(parameters(model), before)
    assert list(model.peft_config) == ["default"]


def test_plain_adapter(base: Any, model: Any, tmp_path: Path) -> None:
    """A folder of plain PEFT, which has neither manifest nor signature, is refused."""
    import peft

    peft.PeftModel.save_pretrained(model, str(tmp_path / "plain"))
    for _, load in loads(base, model):
        assert refused(load, tmp_path / "plain", trusted_keys=TRUSTED)[1] == NO_SIGNATURE


def test_what_was_verified_is_loaded(
    base: Any, model: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are exchanged after they were read have no effect on the load."""
    base_with_other_weights(base).save_pretrained(tmp_path / "evil")
    read = AdapterFolder.read

    def and_then_exchanged(self: AdapterFolder, name: str, **limits: Any) -> memoryview:
        data = read(self, name, **limits)
        if self.signed is not None and (tmp_path / "evil" / name).exists():
            shutil.copyfile(tmp_path / "evil" / name, saved / name)
        return data

    monkeypatch.setattr(AdapterFolder, "read", and_then_exchanged)
    loaded = peftstate.PeftModel.from_pretrained(base(), saved, trusted_keys=TRUSTED)
    assert equal(parameters(loaded), parameters(model))
    evil = (tmp_path / "evil" / "adapter_model.safetensors").read_bytes()
    assert (saved / "adapter_model.safetensors").read_bytes() == evil


def base_with_other_weights(base: Any) -> Any:
    """The same model with another adapter of the same shape."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return peftstate.get_peft_model(base(), config).eval()


def test_unsigned_save_removes_the_signature(base: Any, model: Any, saved: Path) -> None:
    """A later save without a key leaves no signature that would not fit; one with a key does."""
    model.save_pretrained(saved)
    assert not (saved / SIGNATURE_NAME).exists()
    assert refused(peftstate.verify_signature, saved, TRUSTED)[1] == NO_SIGNATURE
    with pytest.warns(errors.UnverifiedWarning):  # of the tokenizer that is still there
        model.save_pretrained(saved, sign_with=OTHER)
    peftstate.sign(saved, OTHER)
    assert peftstate.verify_signature(saved, [OTHER.public_key()]) == OTHER_ID


def test_save_signs_only_what_it_writes(model: Any, tmp_path: Path) -> None:
    """Files that lay in the folder are not signed unseen; a warning names them."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("tokenizer.json", "README.md", "adapter_model.bin"):
        (folder / name).write_text("{}")
    with pytest.warns(errors.UnverifiedWarning) as caught:
        model.save_pretrained(folder, sign_with=KEY)
    assert str(caught[0].message) == (
        f"{folder} holds files that this save has not written, so they are not signed: "
        "tokenizer.json. With trusted_keys the folder is refused until you remove them, or sign "
        "them, too, with peftstate.sign(path, key)."
    )
    assert refused(peftstate.verify_signature, folder, TRUSTED) == (
        folder / "tokenizer.json",
        NOT_COVERED,
    )


def test_several_adapters(base: Any, model: Any, tmp_path: Path) -> None:
    """Each adapter's folder is signed; moved away, it and the rest load by themselves."""
    import peft

    model.add_adapter("ref", peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    folder = tmp_path / "saved"
    model.save_pretrained(folder, sign_with=KEY)
    loaded = peftstate.PeftModel.from_pretrained(base(), folder, trusted_keys=TRUSTED)
    assert list(loaded.peft_config) == ["default", "ref"]
    shutil.move(folder / "ref", tmp_path / "moved")
    peftstate.PeftModel.from_pretrained(base(), tmp_path / "moved", trusted_keys=TRUSTED)
    peftstate.PeftModel.from_pretrained(base(), folder, trusted_keys=TRUSTED, adapters=())


def test_unusable_key(base: Any, model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that cannot be used replaces no file, and everything is rescued, unsigned."""
    before = files_of(saved)
    (saved.parent / "key").write_bytes(b"no key")
    monkeypatch.delenv("PEFTSTATE_KEY_PASSWORD", raising=False)
    reasons = {
        saved.parent / "key": "is not a private key in PEM format",
        saved.parent / "missing": "No such file or directory",
        private_pem(KEY, b"p"): "the key is encrypted; set PEFTSTATE_KEY_PASSWORD",
        7: "a int is not a private key of a supported kind",
    }
    for key, reason in reasons.items():
        with pytest.raises(errors.SaveError, match=r"^The files cannot be signed: ") as caught:
            model.save_pretrained(saved, sign_with=key)
        assert reason in str(caught.value)
        assert files_of(saved) == before
        assert caught.value.rescued is not None
        rescued = peftstate.PeftModel.from_pretrained(base(), caught.value.rescued)
        assert equal(parameters(rescued), parameters(model))


def test_save_without_the_extra(model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `cryptography`, a save that is to be signed says so, and rescues everything."""
    before = files_of(saved)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(errors.SaveError) as caught:
        model.save_pretrained(saved, sign_with=KEY)
    assert str(caught.value) == (
        "The files cannot be signed: signatures need the package cryptography: "
        "pip install 'peftstate[sign]'. No old file was replaced. "
        f"What could be saved is in {caught.value.rescued}."
    )
    assert caught.value.rescued is not None
    assert peftstate.verify_files(caught.value.rescued).ok
    assert files_of(saved) == before


def test_plain_load_of_a_signed_folder(base: Any, model: Any, saved: Path) -> None:
    """Without trusted keys a signature is of no effect, for us and for plain PEFT."""
    import peft

    (saved / "notes.txt").write_text("mine")
    for cls in (peft.PeftModel, peftstate.PeftModel):
        loaded = cls.from_pretrained(base(), str(saved))
        assert equal(parameters(loaded), parameters(model))


def test_paths_in_the_signature(saved: Path) -> None:
    """A signature gives away nothing of where the folder lies but its own name."""
    text = (saved / SIGNATURE_NAME).read_text()
    payload = json.loads(text)["dsseEnvelope"]["payload"]
    import base64

    assert str(saved.parent).encode() not in base64.b64decode(payload)
