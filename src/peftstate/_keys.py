"""Keys that sign and keys that are trusted: Ed25519, and ECDSA on the curves of NIST.

The package `cryptography` is an extra, and is imported when a key is used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        ECDSA,
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    PrivateKey: TypeAlias = Ed25519PrivateKey | EllipticCurvePrivateKey
    PublicKey: TypeAlias = Ed25519PublicKey | EllipticCurvePublicKey
    SigningKey: TypeAlias = str | os.PathLike[str] | bytes | PrivateKey
    TrustedKeys: TypeAlias = Iterable[str | os.PathLike[str] | bytes | PublicKey]

Password: TypeAlias = str | bytes | Callable[[], str | bytes]

PASSWORD_VARIABLE = "PEFTSTATE_KEY_PASSWORD"  # noqa: S105 - a name, no password
"""The environment variable with the password of an encrypted key."""

_KINDS = "Ed25519, or ECDSA on P-256, P-384 or P-521"
_MAX_BYTES = 64 * 1024
"""Size that a file with a key may have."""


class UnusableKeyError(ValueError):
    """A key cannot be read, or is of a kind that is not known here."""


def signing_key(source: SigningKey, *, password: Password | None = None) -> PrivateKey:
    """Load a key to sign with, for `sign` and for ``save_pretrained(…, sign_with=key)``.

    Args:
        source: The path of a PEM file, the bytes of one, or a private key of `cryptography`.
        password: The password of an encrypted key, or what asks for it, which is called only if
            the key is encrypted. By default the environment variable `PEFTSTATE_KEY_PASSWORD`.

    Raises:
        ValueError: It is no private key of a kind that is supported, which are Ed25519 and ECDSA on
            P-256, P-384 and P-521, or the password is missing or does not fit.
        OSError: The file cannot be read.
        ImportError: The package `cryptography` is missing.
    """
    _require_cryptography()
    if not isinstance(source, (str, bytes, os.PathLike)):
        return _checked_private(source, f"a {type(source).__name__}")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data, name = _pem(source)
    try:
        try:
            return _checked_private(load_pem_private_key(data, None), name)
        except TypeError:  # it is encrypted
            pass
        return _checked_private(load_pem_private_key(data, _given(password, name)), name)
    except UnusableKeyError:
        raise
    except (ValueError, UnsupportedAlgorithm):
        raise UnusableKeyError(
            f"{name} is not a private key in PEM format, or the password does not fit"
        ) from None


def trusted_by_id(keys: TrustedKeys) -> dict[str, PublicKey]:
    """Load the keys that are trusted, by their ids.

    Raises:
        TypeError: It is one key, not several.
        ValueError: There is none, or one is no public key of a kind that is supported.
        OSError: A file cannot be read.
        ImportError: The package `cryptography` is missing.
    """
    _require_cryptography()
    if isinstance(keys, (str, bytes, os.PathLike)) or not isinstance(keys, Iterable):
        raise TypeError("trusted_keys= takes several keys; put a single one into a list")
    if found := [_public_key(key) for key in keys]:
        return {key_id(key): key for key in found}
    raise ValueError("trusted_keys= is empty, so nothing at all could be loaded")


def key_id(key: PublicKey) -> str:
    """The id of a public key: the SHA-256 of its PEM file, as OpenSSF model signing has it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def sign_bytes(key: PrivateKey, data: bytes) -> bytes:
    """The signature of some bytes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if isinstance(key, Ed25519PrivateKey):
        return key.sign(data)
    return key.sign(data, _ecdsa(key.curve.key_size))


def fits(key: PublicKey, signature: bytes, data: bytes) -> bool:
    """Whether a signature of some bytes was made with a key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, _ecdsa(key.curve.key_size))
    except InvalidSignature:
        return False
    return True


def _ecdsa(bits: int) -> ECDSA:
    """ECDSA with the hash that goes with the size of a curve, as in OpenSSF model signing."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA({256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[bits])


def _require_cryptography() -> None:
    """Say how to install the extra if it is missing."""
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        message = "signatures need the package cryptography: pip install 'peftstate[sign]'"
        raise ImportError(message) from error


def _pem(source: str | os.PathLike[str] | bytes) -> tuple[bytes, str]:
    """The content of a file with a key, and what to call it."""
    if isinstance(source, bytes):
        return source, "the key"
    with Path(source).open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UnusableKeyError(f"{os.fspath(source)} is too large to be a key")
    return data, os.fspath(source)


def _given(password: Password | None, name: str) -> bytes:
    """The password of an encrypted key."""
    if password is None:
        password = os.environ.get(PASSWORD_VARIABLE)
    if callable(password):
        password = password()
    if not password:
        raise UnusableKeyError(
            f"{name} is encrypted; set {PASSWORD_VARIABLE}, or load it with "
            "peftstate.signing_key(path, password=…)"
        )
    return password.encode() if isinstance(password, str) else password


def _public_key(source: str | os.PathLike[str] | bytes | PublicKey) -> PublicKey:
    """Load one key that is trusted."""
    if not isinstance(source, (str, bytes, os.PathLike)):
        return _checked_public(source, f"a {type(source).__name__}")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data, name = _pem(source)
    if data.count(b"-----BEGIN ") > 1:  # the second would be passed over without a word
        raise UnusableKeyError(f"{name} holds more than one key; use a file for each")
    try:
        return _checked_public(load_pem_public_key(data), name)
    except UnusableKeyError:
        raise
    except (ValueError, UnsupportedAlgorithm):
        raise UnusableKeyError(f"{name} is not a public key in PEM format") from None


def _checked_private(key: object, name: str) -> PrivateKey:
    """Refuse private keys of other kinds."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    is_ecdsa = isinstance(key, EllipticCurvePrivateKey) and key.curve.name in _CURVES
    if isinstance(key, Ed25519PrivateKey) or is_ecdsa:
        return key  # type: ignore[return-value]
    raise UnusableKeyError(f"{name} is not a private key of a supported kind: {_KINDS}")


def _checked_public(key: object, name: str) -> PublicKey:
    """Refuse public keys of other kinds."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    is_ecdsa = isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES
    if isinstance(key, Ed25519PublicKey) or is_ecdsa:
        return key  # type: ignore[return-value]
    raise UnusableKeyError(f"{name} is not a public key of a supported kind: {_KINDS}")


_CURVES = frozenset({"secp256r1", "secp384r1", "secp521r1"})

TrustedById: TypeAlias = "Mapping[str, PublicKey]"
