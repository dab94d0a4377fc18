"""The signature file: what OpenSSF model signing 1.0 writes for a key, and nothing of its own.

An in-toto statement lists the files with their SHA-256; a DSSE envelope holds the statement and the
signature; a Sigstore bundle holds the envelope and the id of the key. Only what the statement says,
once its signature has been verified, is of any effect; the rest is to find the key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from peftstate._codec import DecodeError, canonical, loads
from peftstate._diff import Json, join, step
from peftstate._keys import fits, key_id, sign_bytes
from peftstate._names import safe_name
from peftstate.errors import SignatureError

if TYPE_CHECKING:
    from peftstate._keys import PrivateKey, TrustedById

MAX_BYTES = 2 * 1024 * 1024
"""Size that a signature file may have; one of a hundred files has 25 KB."""

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@attrs.frozen
class Statement:
    """What a key has signed.

    Attributes:
        key: The id of the key.
        files: The SHA-256 of each file, by its name in the folder.
    """

    key: str
    files: Mapping[str, str]


def signature_file(
    files: Mapping[str, str], key: PrivateKey, *, name: str, ignored: Collection[str]
) -> bytes:
    """Sign files.

    Args:
        files: The SHA-256 of each, by its name in the folder.
        key: The key.
        name: What the folder is called, for those who read it.
        ignored: What other verifiers are told to pass over in the folder.

    Returns:
        The content of the signature file.

    Raises:
        SignatureError: It would be refused: there are thousands of files, or the key signs wrongly.
    """
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": _root(sorted(files.items()))}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted(ignored),
            },
            "resources": [
                {"name": file, "algorithm": "sha256", "digest": digest}
                for file, digest in sorted(files.items())
            ],
        },
    }
    payload = canonical(statement)
    signature = sign_bytes(key, _to_sign(payload))
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {
            "publicKey": {"hint": key_id(key.public_key())},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    data = canonical(bundle)
    verified(data, {key_id(key.public_key()): key.public_key()}, name)
    return data


def verified(data: bytes, trusted: TrustedById, path: str) -> Statement:
    """Read a signature file and verify the signature.

    Args:
        data: Its content, whose size the caller has limited.
        trusted: The public keys that may have signed, by their ids.
        path: Where it comes from, for errors.

    Raises:
        SignatureError: It was not signed by one of the keys, or is not what the format allows.
    """
    try:
        bundle = loads(data)
        _expect(bundle, _BUNDLE, "mediaType")
        _expect(bundle, _PAYLOAD, "dsseEnvelope", "payloadType")
        payload = _base64(bundle, "dsseEnvelope", "payload")
        if len(signatures := _get(bundle, list, "dsseEnvelope", "signatures")) != 1:
            raise DecodeError(
                f"expected 1 signature, found {len(signatures)}", field="dsseEnvelope.signatures"
            )
        signature = _base64(bundle, "dsseEnvelope", "signatures", 0, "sig")
        hint = _get(bundle, str, "verificationMaterial", "publicKey", "hint")
        if not _SHA256.fullmatch(hint):
            raise DecodeError("expected a SHA-256", field="verificationMaterial.publicKey.hint")
        if hint not in trusted:
            raise SignatureError(
                path,
                f"it was made with key {hint}, which is not trusted; trusted is "
                f"{', '.join(trusted)}. Add its public key to trusted_keys if you trust its owner.",
            )
        if not fits(trusted[hint], signature, _to_sign(payload)):
            raise SignatureError(
                path,
                f"it does not fit: it was not made with key {hint}, or was changed since. "
                "Do not load the folder; get it anew from its author.",
            )
        return Statement(hint, _files(loads(payload)))
    except DecodeError as error:
        reason = f"{error.field}: {error}" if error.field else str(error)
        message = f"it is not a signature that peftstate can read ({reason})."
        raise SignatureError(path, message) from None


def _to_sign(payload: bytes) -> bytes:
    """What is signed: DSSE's encoding of a payload with its type, which no other one has."""
    head = f"DSSEv1 {len(_PAYLOAD)} {_PAYLOAD} {len(payload)} "
    return head.encode() + payload


def _root(files: Collection[tuple[str, str]]) -> str:
    """The digest of the whole, as OpenSSF model signing computes it."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in files)).hexdigest()


def _files(statement: Json) -> dict[str, str]:
    """The files of a statement."""
    _expect(statement, _STATEMENT, "_type")
    _expect(statement, _PREDICATE, "predicateType")
    _expect(statement, "files", "predicate", "serialization", "method")
    _expect(statement, "sha256", "predicate", "serialization", "hash_type")
    resources = _get(statement, list, "predicate", "resources")
    files: dict[str, str] = {}
    for place in range(len(resources)):
        where = ("predicate", "resources", place)
        name = _get(statement, str, *where, "name")
        digest = _get(statement, str, *where, "digest")
        _expect(statement, "sha256", *where, "algorithm")
        if not _SHA256.fullmatch(digest):
            raise DecodeError("expected a SHA-256", field=_path(*where, "digest"))
        try:
            safe_name(name)
        except ValueError as error:
            raise DecodeError(str(error), field=_path(*where, "name")) from None
        if name in files:
            raise DecodeError(f"{name!r} stands twice", field=_path(*where, "name"))
        files[name] = digest
    if len(_get(statement, list, "subject")) != 1:
        raise DecodeError("expected 1 subject", field="subject")
    _expect(statement, _root(files.items()), "subject", 0, "digest", "sha256")
    return files


def _get(value: Json, kind: type[Any], *path: Any) -> Any:
    """The value at a path of keys and places, which must be of a type.

    Raises:
        DecodeError: It is not there, or of another type.
    """
    for place, key in enumerate(path):
        container = list if isinstance(key, int) else dict
        if type(value) is not container:
            raise DecodeError("has the wrong type", field=_path(*path[:place]))
        try:
            value = value[key]
        except (KeyError, IndexError):
            raise DecodeError("is missing", field=_path(*path[: place + 1])) from None
    if type(value) is not kind:
        raise DecodeError("has the wrong type", field=_path(*path))
    return value


def _expect(value: Json, expected: str, *path: str | int) -> None:
    """Refuse any other value at a path."""
    if (found := _get(value, str, *path)) != expected:
        raise DecodeError(f"expected {expected!r}, found {found[:80]!r}", field=_path(*path))


def _base64(value: Json, *path: str | int) -> bytes:
    """The bytes at a path."""
    try:
        return base64.b64decode(_get(value, str, *path), validate=True)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"not base64 ({error})", field=_path(*path)) from None


def _path(*keys: str | int) -> str:
    """A path as errors write it."""
    path = ""
    for key in keys:
        path = f"{path}[{key}]" if isinstance(key, int) else join(path, step(key))
    return path
