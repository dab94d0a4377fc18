"""Keys: what may sign, what may be trusted, and how keys that are neither are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from peftstate import _keys
from peftstate._keys import (
    PASSWORD_VARIABLE,
    UnusableKeyError,
    fits,
    key_id,
    sign_bytes,
    signing_key,
    trusted_by_id,
)

KINDS: dict[str, Any] = {
    "Ed25519": ed25519.Ed25519PrivateKey.generate(),
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
}
OTHERS: dict[str, Any] = {
    "RSA": rsa.generate_private_key(65537, 2048),
    "secp256k1": ec.generate_private_key(ec.SECP256K1()),
}


def private_pem(key: Any, password: bytes | None = None) -> bytes:
    """The PEM file of a private key."""
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return pem


def public_pem(key: Any) -> bytes:
    """The PEM file of the public key of a private one."""
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


@pytest.mark.parametrize("kind", KINDS)
def test_sign_and_verify(kind: str, tmp_path: Path) -> None:
    """A key signs and is trusted in each form; another text or key does not fit."""
    key = KINDS[kind]
    (tmp_path / "key.pem").write_bytes(private_pem(key))
    (tmp_path / "key.pub").write_bytes(public_pem(key))
    private = [tmp_path / "key.pem", str(tmp_path / "key.pem"), private_pem(key), key]
    public = [
        tmp_path / "key.pub",
        str(tmp_path / "key.pub"),
        public_pem(key),
        key.public_key(),
    ]
    for source, trusted in zip(private, public, strict=True):
        signature = sign_bytes(signing_key(source), b"text")
        ((identity, loaded),) = trusted_by_id([trusted]).items()
        assert identity == key_id(key.public_key())
        assert fits(loaded, signature, b"text")
        assert not fits(loaded, signature, b"Text")
        assert not fits(loaded, signature[:-1], b"text")
        assert not fits(loaded, b"", b"text")
        for other in KINDS.values():
            assert other is key or not fits(other.public_key(), signature, b"text")


def test_key_id_is_that_of_the_file(tmp_path: Path) -> None:
    """The id of a key is the SHA-256 of its PEM file, as everybody can compute it."""
    import hashlib

    pem = public_pem(KINDS["Ed25519"])
    assert list(trusted_by_id([pem])) == [hashlib.sha256(pem).hexdigest()]


def test_several_trusted_keys() -> None:
    """Keys are found by their ids, given as any iterable."""
    keys = trusted_by_id(iter(key.public_key() for key in KINDS.values()))
    assert list(keys) == [key_id(key.public_key()) for key in KINDS.values()]


@pytest.mark.parametrize("password", ["p", b"p", lambda: "p", lambda: b"p"])
def test_encrypted_key(password: Any) -> None:
    """An encrypted key takes its password as text, as bytes, or from what asks for it."""
    key = KINDS["Ed25519"]
    loaded = signing_key(private_pem(key, b"p"), password=password)
    assert key_id(loaded.public_key()) == key_id(key.public_key())


def test_password_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a password, that of the environment is taken."""
    monkeypatch.setenv(PASSWORD_VARIABLE, "p")
    signing_key(private_pem(KINDS["P-256"], b"p"))


def test_password_is_asked_for_when_needed() -> None:
    """For a key that is not encrypted nobody is asked for a password."""
    signing_key(private_pem(KINDS["P-256"]), password=lambda: pytest.fail("asked"))


def test_encrypted_key_without_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing password says where it is looked for; a wrong one is no other library's error."""
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    pem = private_pem(KINDS["Ed25519"], b"p")
    with pytest.raises(UnusableKeyError) as caught:
        signing_key(pem)
    assert str(caught.value) == (
        "the key is encrypted; set PEFTSTATE_KEY_PASSWORD, or load it with "
        "peftstate.signing_key(path, password=…)"
    )
    with pytest.raises(UnusableKeyError) as caught:
        signing_key(pem, password=b"q")
    assert str(caught.value) == (
        "the key is not a private key in PEM format, or the password does not fit"
    )


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds(kind: str) -> None:
    """Keys of other kinds are refused, whether they are to sign or to be trusted."""
    key = OTHERS[kind]
    supported = "of a supported kind: Ed25519, or ECDSA on P-256, P-384 or P-521"
    with pytest.raises(UnusableKeyError) as caught:
        signing_key(private_pem(key))
    assert str(caught.value) == f"the key is not a private key {supported}"
    with pytest.raises(UnusableKeyError) as caught:
        trusted_by_id([public_pem(key)])
    assert str(caught.value) == f"the key is not a public key {supported}"
    uses: list[tuple[Callable[..., object], Any]] = [
        (signing_key, key),
        (trusted_by_id, [key.public_key()]),
    ]
    for function, wrong in uses:
        with pytest.raises(ValueError, match=f" key {supported}$"):
            function(wrong)


def test_what_is_no_key(tmp_path: Path) -> None:
    """What is no key, or the other half of one, is refused by its file's name."""
    file = tmp_path / "file"
    pair: dict[Callable[..., object], bytes] = {
        signing_key: public_pem(KINDS["P-256"]),
        _public: private_pem(KINDS["P-256"]),
    }
    for function, half in pair.items():
        for data in (b"", b"\0", b"-----BEGIN PUBLIC KEY-----\n", half):
            file.write_bytes(data)
            with pytest.raises(ValueError, match=f"^{file} is not a p[a-z]+ key in PEM format"):
                function(file)
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "missing")
    file.write_bytes(b" " * (_keys._MAX_BYTES + 1))
    for function in pair:
        with pytest.raises(ValueError, match=f"^{file} is too large to be a key$"):
            function(file)
    with pytest.raises(ValueError, match=r"^a int is not a private key of a supported kind"):
        signing_key(1)  # type: ignore[arg-type]


def _public(source: Path) -> None:
    """Load one trusted key."""
    trusted_by_id([source])


def test_two_keys_in_a_file(tmp_path: Path) -> None:
    """A file with two public keys is refused, since the second would be passed over."""
    (tmp_path / "keys").write_bytes(public_pem(KINDS["P-256"]) + public_pem(KINDS["Ed25519"]))
    with pytest.raises(ValueError, match=r"/keys holds more than one key; use a file for each$"):
        trusted_by_id([tmp_path / "keys"])


def test_trusted_keys_that_are_no_list() -> None:
    """One key in place of several, and none at all, are mistakes that are named."""
    key = KINDS["Ed25519"].public_key()
    for one in ("key.pub", Path("key.pub"), public_pem(KINDS["P-256"]), key):
        with pytest.raises(TypeError) as caught:
            trusted_by_id(one)  # type: ignore[arg-type]
        assert str(caught.value) == "trusted_keys= takes several keys; put a single one into a list"
    with pytest.raises(ValueError, match=r"^trusted_keys= is empty, so nothing at all could be l"):
        trusted_by_id([])


def test_without_the_extra() -> None:
    """Without the package `cryptography`, its first use says how to install it."""
    code = """
import sys
sys.modules["cryptography"] = None
import peftstate
for use in (lambda: peftstate.signing_key("key"), lambda: peftstate.sign(".", "key"),
            lambda: peftstate.verify_signature(".", ["key"]),
            lambda: peftstate.read_manifest(".", trusted_keys=["key"])):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message = "signatures need the package cryptography: pip install 'peftstate[sign]'\n"
    assert done.stdout == message * 4
