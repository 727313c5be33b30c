"""Keys of a secure sum: who signs, which two agree, what is sealed. All of it from `cryptography`.

Ed25519 signatures (RFC 8032), X25519 agreement (RFC 7748), HKDF-SHA256 (RFC 5869), AES-256-GCM (NIST SP 800-38D).
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregation.shamir import Entropy
from contract.errors import SecureSumError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
_NONCE_BYTES = 12


def digest(label: str, *fields: bytes | str | int) -> bytes:
    """SHA-256 over `label` and `fields`, each behind its type and its length, so that no two lists of them agree."""
    hashed = hashlib.sha256()
    for field in (label, *fields):
        raw = field if isinstance(field, bytes) else str(field).encode()
        kind = b"b" if isinstance(field, bytes) else b"s" if isinstance(field, str) else b"i"
        hashed.update(kind + len(raw).to_bytes(8, "big"))
        hashed.update(raw)
    return hashed.digest()


def public_bytes(secret: bytes) -> bytes:
    """The X25519 public key of the 32 bytes `secret`."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes, whose: str) -> bytes:
    """The X25519 shared secret. Raises SecureSumError for a key that is none, or that makes the result public."""
    try:
        own, other = X25519PrivateKey.from_private_bytes(secret), X25519PublicKey.from_public_bytes(public)
        return own.exchange(other)
    except ValueError as error:
        raise SecureSumError(f"the X25519 key of {whose} cannot be used: {error}") from error


def derive(secret: bytes, session_id: bytes, purpose: str, *context: bytes | str | int) -> bytes:
    """A 32-byte key from `secret` by HKDF-SHA256: salted with the session, bound to purpose and context."""
    return HKDF(SHA256(), KEY_BYTES, salt=session_id, info=digest(purpose, *context)).derive(secret)


def seal(key: bytes, plain: bytes, bound_to: bytes, entropy: Entropy) -> bytes:
    """Nonce and AES-256-GCM ciphertext of `plain`, bound to the associated data."""
    nonce = entropy(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, bound_to)


def unseal(key: bytes, sealed: bytes, bound_to: bytes, whose: str) -> bytes:
    """What `seal` was given; raises SecureSumError for anything that was not sealed with this key for this place."""
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound_to)
    except (InvalidTag, ValueError) as error:
        raise SecureSumError(f"the shares sealed by {whose} cannot be opened: forged, or for another place") from error


def sign(identity: Ed25519PrivateKey, message: bytes) -> bytes:
    return identity.sign(message)


def verify(identity_key: bytes, signature: bytes, message: bytes, what: str) -> None:
    """Raises SecureSumError, naming `what`, unless the owner of `identity_key` signed `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(identity_key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise SecureSumError(f"{what} is not signed by the identity in the roster") from error
