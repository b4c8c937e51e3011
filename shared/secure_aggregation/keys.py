"""Keys between two clients, and what one seals for the other past the server.

Two clients share the hash of two X25519 secrets: one of keys made for this sum (so that a key stolen later opens no
recording) and one of their identities' static keys (so that nobody else can pose as either: whoever swaps a key on the
way, the server too, makes boxes that do not open). Sender, receiver and everything both should have seen (`view`) go
into the key, so a box opens only at its receiver, from its sender, within this sum.

Every key here seals one box or makes one mask, so nonces are zero.
"""

import hashlib
from collections.abc import Iterable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.errors import SchemaError

KEY_BYTES = 32
TAG_BYTES = 16
LABEL = b"flglm secure aggregation, version 1: "


def derive(secret: bytes, purpose: str, view: bytes, *numbers: int) -> bytes:
    """HKDF-SHA256 (RFC 5869): a key of 32 bytes for one purpose, in one view (32 bytes), among these clients."""
    info = LABEL + purpose.encode() + b"\0" + view + b"".join(number.to_bytes(8) for number in numbers)
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def commitment(value: bytes, purpose: str, view: bytes, *numbers: int) -> bytes:
    """SHA-256 of a value that nobody can guess: hides it, and fits no other."""
    where = LABEL + purpose.encode() + b"\0" + view + b"".join(number.to_bytes(8) for number in numbers)
    return hashlib.sha256(where + value).digest()


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """X25519, 32 bytes. Raises SchemaError for a public key of low order: everybody would know the secret."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SchemaError("a public key of low order") from None


def pair_secret(fresh: X25519PrivateKey, static: X25519PrivateKey, peer_fresh: bytes, peer_static: bytes) -> bytes:
    """64 bytes that only we and the owner of these public keys can know. Raises SchemaError."""
    return agree(fresh, peer_fresh) + agree(static, peer_static)


def view_of(terms_digest: bytes, keys: Iterable[tuple[int, bytes]]) -> bytes:
    """SHA-256 of the terms' digest and of all public keys by number, 32 bytes: what its owner believes is agreed."""
    parts = (number.to_bytes(8) + key for number, key in keys)
    return hashlib.sha256(terms_digest + b"".join(parts)).digest()


def seal(key: bytes, plaintext: bytes, associated: bytes = b"") -> bytes:
    """AES-256-GCM under a key that is used once; 16 bytes longer."""
    return AESGCM(key).encrypt(bytes(12), plaintext, associated)


def unseal(key: bytes, box: bytes, associated: bytes = b"") -> bytes | None:
    """None if it was sealed under another key, or changed."""
    try:
        return AESGCM(key).decrypt(bytes(12), box, associated)
    except InvalidTag:
        return None
