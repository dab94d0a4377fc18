"""The signature file: what is written, and that nothing else than that is read."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from peftstate import errors
from peftstate._envelope import Statement, _to_sign, signature_file, verified
from peftstate._keys import key_id, sign_bytes, trusted_by_id

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
ID, OTHER_ID = (key_id(key.public_key()) for key in (KEY, OTHER))
TRUSTED = trusted_by_id([KEY.public_key()])
A, B = (hashlib.sha256(text).hexdigest() for text in (b"a", b"b"))
FILES = {"peftstate.json": A, "ref/b": B}
DATA = signature_file(FILES, KEY, name="adapter", ignored={"model.sig", "README.md"})

Edit = Callable[[dict[str, Any]], Any]


def statement_of(data: bytes) -> dict[str, Any]:
    """The statement in a signature file."""
    payload = json.loads(data)["dsseEnvelope"]["payload"]
    statement: dict[str, Any] = json.loads(base64.b64decode(payload))
    return statement


def signed_anew(payload: bytes) -> bytes:
    """A signature file that holds a payload, signed with the trusted key."""
    bundle = json.loads(DATA)
    envelope = bundle["dsseEnvelope"]
    envelope["payload"] = base64.b64encode(payload).decode()
    signature = sign_bytes(KEY, _to_sign(payload))
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    return json.dumps(bundle).encode()


def refused(data: bytes) -> str:
    """The reason for which a signature file is refused."""
    with pytest.raises(errors.SignatureError) as caught:
        verified(data, TRUSTED, "a/model.sig")
    assert caught.value.path == "a/model.sig"
    assert str(caught.value) == f"a/model.sig: {caught.value.reason}"
    return caught.value.reason


def malformed(data: bytes) -> str:
    """What is said of a signature file that cannot be read."""
    head, tail = "it is not a signature that peftstate can read (", ")."
    reason = refused(data)
    assert reason.startswith(head)
    assert reason.endswith(tail)
    return reason.removeprefix(head).removesuffix(tail)


def test_round_trip() -> None:
    """What is signed comes back, and equal files give equal bytes."""
    assert verified(DATA, TRUSTED, "") == Statement(ID, FILES)
    again = signature_file(
        dict(reversed(FILES.items())), KEY, name="adapter", ignored=["README.md", "model.sig"]
    )
    assert again == DATA


def test_format() -> None:
    """The file is a Sigstore bundle with the statement of OpenSSF model signing, to the letter."""
    bundle = json.loads(DATA)
    envelope = bundle.pop("dsseEnvelope")
    assert bundle == {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": ID}, "tlogEntries": []},
    }
    payload = base64.b64decode(envelope["payload"])
    (signature,) = envelope["signatures"]
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert signature["keyid"] == ""
    head = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload)
    KEY.public_key().verify(base64.b64decode(signature["sig"]), head + payload)
    root = hashlib.sha256(bytes.fromhex(A) + bytes.fromhex(B)).hexdigest()
    assert json.loads(payload) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "adapter", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": ["README.md", "model.sig"],
            },
            "resources": [
                {"name": "peftstate.json", "algorithm": "sha256", "digest": A},
                {"name": "ref/b", "algorithm": "sha256", "digest": B},
            ],
        },
    }


def test_unknown_key() -> None:
    """A key that is not trusted is named, and so are those that are."""
    data = signature_file(FILES, OTHER, name="adapter", ignored=())
    assert refused(data) == (
        f"it was made with key {OTHER_ID}, which is not trusted; trusted is {ID}. "
        "Add its public key to trusted_keys if you trust its owner."
    )


def test_signature_that_does_not_fit() -> None:
    """Another statement, another signature, or the id of a key that has not signed, do not fit."""
    expected = (
        f"it does not fit: it was not made with key {ID}, or was changed since. "
        "Do not load the folder; get it anew from its author."
    )
    other = json.loads(signature_file({"peftstate.json": B}, KEY, name="adapter", ignored=()))
    bundle = json.loads(DATA)
    bundle["dsseEnvelope"]["payload"] = other["dsseEnvelope"]["payload"]
    assert refused(json.dumps(bundle).encode()) == expected
    bundle = json.loads(DATA)
    bundle["dsseEnvelope"]["signatures"] = other["dsseEnvelope"]["signatures"]
    assert refused(json.dumps(bundle).encode()) == expected
    bundle = json.loads(signature_file(FILES, OTHER, name="adapter", ignored=()))
    bundle["verificationMaterial"]["publicKey"]["hint"] = ID
    assert refused(json.dumps(bundle).encode()) == expected


def test_payload_type_is_signed() -> None:
    """What the key has signed for another purpose, even the same text, does not pass."""
    bundle = json.loads(DATA)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(KEY.sign(payload)).decode()
    assert refused(json.dumps(bundle).encode()).startswith("it does not fit: ")


NO_BUNDLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not UTF-8 JSON: Expecting value: line 1 column 1 (char 0)"),
    "no text": (b"\xff", "not UTF-8 JSON: 'utf-8' codec can't decode byte 0xff"),
    "cut off": (DATA[:-1], "not UTF-8 JSON: Expecting ',' delimiter"),
    "a list": (b"[]", "has the wrong type"),
    "deep": (b"[" * 100_000, "more than 24 levels of nesting"),
    "NaN": (b'{"mediaType": NaN}', "NaN is not JSON"),
    "a key twice": (b'{"mediaType": 1, "mediaType": 1}', "key 'mediaType' stands twice"),
    "a huge number": (
        b'{"mediaType": ' + b"9" * 5000 + b"}",
        "an integer of more than 4000 digits",
    ),
    "nothing": (b"{}", "mediaType: is missing"),
}


@pytest.mark.parametrize("case", NO_BUNDLES)
def test_no_json(case: str) -> None:
    """What is no JSON object, or one that JSON's parsers disagree about, is refused."""
    data, reason = NO_BUNDLES[case]
    assert malformed(data).startswith(reason)


def set_at(*path: Any) -> Edit:
    """An edit: the last of the path is the value, what is before it says where."""

    def edit(value: Any) -> None:
        *keys, last, new = path
        for key in keys:
            value = value[key]
        value[last] = new

    return edit


def drop(*path: Any) -> Edit:
    """An edit that takes something away."""

    def edit(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return edit


HINT = ("verificationMaterial", "publicKey", "hint")
SIGNATURES = ("dsseEnvelope", "signatures")
BUNDLES: list[tuple[Edit, str]] = [
    (set_at("mediaType", 1), "mediaType: has the wrong type"),
    (
        set_at("mediaType", "application/vnd.dev.sigstore.bundle+json;version=0.1"),
        (
            "mediaType: expected 'application/vnd.dev.sigstore.bundle.v0.3+json', "
            "found 'application/vnd.dev.sigstore.bundle+json;version=0.1'"
        ),
    ),
    (drop("dsseEnvelope"), "dsseEnvelope: is missing"),
    (set_at("dsseEnvelope", []), "dsseEnvelope: has the wrong type"),
    (
        set_at("dsseEnvelope", "payloadType", "text/plain"),
        "dsseEnvelope.payloadType: expected 'application/vnd.in-toto+json', found 'text/plain'",
    ),
    (drop("dsseEnvelope", "payload"), "dsseEnvelope.payload: is missing"),
    (
        set_at("dsseEnvelope", "payload", "a"),
        (
            "dsseEnvelope.payload: not base64 (Invalid base64-encoded string: number of data "
            "characters (1) cannot be 1 more than a multiple of 4)"
        ),
    ),
    (
        set_at("dsseEnvelope", "payload", "é"),
        "dsseEnvelope.payload: not base64 (string argument should contain only ASCII characters)",
    ),
    (set_at(*SIGNATURES, {}), "dsseEnvelope.signatures: has the wrong type"),
    (set_at(*SIGNATURES, []), "dsseEnvelope.signatures: expected 1 signature, found 0"),
    (
        set_at(*SIGNATURES, [{"sig": ""}, {"sig": ""}]),
        "dsseEnvelope.signatures: expected 1 signature, found 2",
    ),
    (set_at(*SIGNATURES, 0, None), "dsseEnvelope.signatures[0]: has the wrong type"),
    (drop(*SIGNATURES, 0, "sig"), "dsseEnvelope.signatures[0].sig: is missing"),
    (set_at(*SIGNATURES, 0, "sig", 7), "dsseEnvelope.signatures[0].sig: has the wrong type"),
    # of a signature without a key: by certificate, or by an identity
    (drop("verificationMaterial", "publicKey"), "verificationMaterial.publicKey: is missing"),
    (drop(*HINT), "verificationMaterial.publicKey.hint: is missing"),
    (set_at(*HINT, None), "verificationMaterial.publicKey.hint: has the wrong type"),
    (set_at(*HINT, "\x1b[2J"), "verificationMaterial.publicKey.hint: expected a SHA-256"),
    (set_at(*HINT, ID.upper()), "verificationMaterial.publicKey.hint: expected a SHA-256"),
]


@pytest.mark.parametrize(("edit", "reason"), BUNDLES)
def test_malformed_bundle(edit: Edit, reason: str) -> None:
    """A bundle that lacks something or holds something else is refused by the field's name."""
    bundle = copy.deepcopy(json.loads(DATA))
    edit(bundle)
    assert malformed(json.dumps(bundle).encode()) == reason


RESOURCES = ("predicate", "resources")
STATEMENTS: list[tuple[Edit, str]] = [
    (
        set_at("_type", "https://in-toto.io/Statement/v0.1"),
        (
            "_type: expected 'https://in-toto.io/Statement/v1', "
            "found 'https://in-toto.io/Statement/v0.1'"
        ),
    ),
    (
        set_at("predicateType", "https://model_signing/Digests/v0.1"),
        (
            "predicateType: expected 'https://model_signing/signature/v1.0', "
            "found 'https://model_signing/Digests/v0.1'"
        ),
    ),
    (
        set_at("predicate", "serialization", "method", "shards"),
        "predicate.serialization.method: expected 'files', found 'shards'",
    ),
    (
        set_at("predicate", "serialization", "hash_type", "blake3"),
        "predicate.serialization.hash_type: expected 'sha256', found 'blake3'",
    ),
    (drop(*RESOURCES), "predicate.resources: is missing"),
    (set_at(*RESOURCES, 0, []), "predicate.resources[0]: has the wrong type"),
    (
        set_at(*RESOURCES, 1, "algorithm", "blake2b"),
        "predicate.resources[1].algorithm: expected 'sha256', found 'blake2b'",
    ),
    (
        set_at(*RESOURCES, 1, "digest", B.upper()),
        "predicate.resources[1].digest: expected a SHA-256",
    ),
    (set_at(*RESOURCES, 1, "digest", B[:-1]), "predicate.resources[1].digest: expected a SHA-256"),
    (
        set_at(*RESOURCES, 1, "name", "peftstate.json"),
        "predicate.resources[1].name: 'peftstate.json' stands twice",
    ),
    (
        set_at(*RESOURCES, 1, "name", "../b"),
        "predicate.resources[1].name: '../b' has a part that is '.' or '..'",
    ),
    (
        set_at(*RESOURCES, 1, "name", "/b"),
        "predicate.resources[1].name: '/b' has an empty part, or is absolute",
    ),
    (
        set_at(*RESOURCES, 1, "name", "a/b/c"),
        "predicate.resources[1].name: 'a/b/c' has more than two parts",
    ),
    (set_at("subject", []), "subject: expected 1 subject"),
    (drop("subject", 0, "digest", "sha256"), "subject[0].digest.sha256: is missing"),
    (
        set_at("subject", 0, "digest", "sha256", A),
        (
            "subject[0].digest.sha256: expected "
            f"'{statement_of(DATA)['subject'][0]['digest']['sha256']}', found '{A}'"
        ),
    ),
]


@pytest.mark.parametrize(("edit", "reason"), STATEMENTS)
def test_malformed_statement(edit: Edit, reason: str) -> None:
    """Even a trusted key's statement is refused if it is not what the format allows."""
    statement = statement_of(DATA)
    edit(statement)
    assert malformed(signed_anew(json.dumps(statement).encode())) == reason


@pytest.mark.parametrize("payload", [b"", b"[]", b"\xff", b'{"_type": NaN}', b"[" * 100_000])
def test_signed_payload_that_is_no_statement(payload: bytes) -> None:
    """Neither is something else that a trusted key has signed."""
    malformed(signed_anew(payload))


def test_what_is_unknown_is_passed_over() -> None:
    """Fields that later versions of the formats may add change nothing, as they say themselves."""
    statement = statement_of(DATA)
    statement["predicate"]["later"] = {"a": 1}
    bundle = json.loads(signed_anew(json.dumps(statement).encode()))
    bundle["verificationMaterial"]["tlogEntries"] = [{"logIndex": "1"}]
    assert verified(json.dumps(bundle).encode(), TRUSTED, "") == Statement(ID, FILES)


def test_flipped_bits() -> None:
    """With any one bit changed, the file is refused, or says what was signed."""
    refusals = 0
    for place in range(len(DATA)):
        for bit in range(8):
            damaged = bytearray(DATA)
            damaged[place] ^= 1 << bit
            try:
                assert verified(bytes(damaged), TRUSTED, "") == Statement(ID, FILES)
            except errors.SignatureError:
                refusals += 1
    # what does not count: "keyid", "tlogEntries", and the unused bits at the end of base64
    assert refusals > len(DATA) * 8 * 0.95


def test_too_many_files() -> None:
    """What could not be read again is not signed."""
    files = {f"{number}.json": A for number in range(20_000)}
    with pytest.raises(errors.SignatureError):
        signature_file(files, KEY, name="adapter", ignored=())


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Whatever a file holds, it is refused with the one error."""
    refused(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
PATHS = st.sampled_from(
    [
        ("mediaType",),
        ("verificationMaterial",),
        HINT[:2],
        HINT,
        ("dsseEnvelope",),
        ("dsseEnvelope", "payload"),
        SIGNATURES,
        (*SIGNATURES, 0),
        (*SIGNATURES, 0, "sig"),
    ]
)


@given(PATHS, JSON)
def test_any_value_in_a_bundle(path: tuple[Any, ...], value: Any) -> None:
    """Whatever stands in a field that counts, if it is not what was signed it is refused."""
    bundle = json.loads(DATA)
    set_at(*path, value)(bundle)
    refused(json.dumps(bundle).encode())
