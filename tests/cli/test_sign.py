"""``peftstate sign`` and ``verify --trusted-key``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from peftstate.cli.app import app

GOLDEN = Path(__file__).parent.parent / "golden" / "schema-1" / "two-adapters"


def run(*arguments, **options):
    """Run the program in this process."""
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "PEFTSTATE_KEY_PASSWORD": None}
    return CliRunner(env=environment).invoke(app, [*map(str, arguments)], **options)


@pytest.fixture
def adapter(tmp_path):
    """A folder of two adapters that may be written to."""
    folder = shutil.copytree(GOLDEN, tmp_path / "adapter", copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture
def keys(tmp_path):
    """A pair of keys, the private one encrypted with the password `open`."""
    private = Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    (tmp_path / "key.pem").write_bytes(
        private.private_bytes(
            pem,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open"),
        )
    )
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)
    return tmp_path / "key.pem", tmp_path / "key.pub"


def test_what_was_signed_verifies(adapter, keys):
    """The password is asked for; after that the public key verifies the folder and its parts."""
    private, public = keys
    assert run("verify", adapter, "--trusted-key", public).exit_code == 1
    result = run("sign", adapter, "--key", private, input="open\n")
    assert result.exit_code == 0, result.output
    assert f"{adapter}: signed by " in result.output
    assert run("verify", "-r", adapter, "--trusted-key", public).exit_code == 0


def test_what_was_changed_after_it_was_signed_does_not(adapter, keys):
    """A file that the manifest does not cover is covered by the signature."""
    private, public = keys
    run("sign", adapter, "--key", private, input="open\n")
    (adapter / "tokenizer.json").write_text("{}")
    assert run("verify", adapter).exit_code == 0
    result = run("verify", adapter, "--trusted-key", public)
    assert result.exit_code == 1
    assert "SignatureError" in result.output


def test_a_wrong_password_is_told(adapter, keys):
    """Without a traceback, and nothing is signed."""
    result = run("sign", adapter, "--key", keys[0], input="shut\n")
    assert result.exit_code == 1
    assert not (adapter / "model.sig").exists()
    assert "password" in result.output.lower()


def test_nothing_to_sign(tmp_path, keys):
    """A folder without a manifest is not signed."""
    (tmp_path / "empty").mkdir()
    result = run("sign", tmp_path / "empty", "--key", keys[0], input="open\n")
    assert result.exit_code == 3
