"""Identities: a private key that stays on its machine, and the card that its owner gives to the others.

    <name>.key    a private key; only its owner can read it, and it never leaves its machine
    <name>.card   the public keys with their fingerprint; sent to whoever shall admit its owner

One secret, two key pairs: X25519 for the end-to-end handshake, and one derived from it for the link to the broker
(CURVE), so that neither protocol sees the other's key.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr, TypeAdapter, ValidationError

from shared.errors import KeyFileError
from shared.key_files import Hex16, Hex32, KeyFile, create, parse
from shared.wire.curve import LinkKeys
from shared.wire.envelope import Name


class _PrivateKey(KeyFile):
    name: Name
    private_key: SecretStr


class Card(KeyFile):
    """What the others may know of a person or machine.

    Name, public keys (X25519, and of its links) with their fingerprint, and the invitation that it answers.
    """

    name: Name
    public_key: Hex32
    link_key: Hex32
    fingerprint: str
    invitation: Hex16 | None = None

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return bytes.fromhex(self.public_key)

    @property
    def link_public(self) -> bytes:
        """The public key of its links, 32 bytes."""
        return bytes.fromhex(self.link_key)


@dataclass(frozen=True)
class Identity:
    """A name with its X25519 private key and public key (32 bytes), and the keys of its links."""

    name: str
    private: X25519PrivateKey = field(repr=False)
    public: bytes
    link: LinkKeys


def key_digest(public: bytes) -> bytes:
    """SHA-256 of a public key, 32 bytes: what a server is called by in routing headers."""
    return hashlib.sha256(public).digest()


def fingerprint(public: bytes, link_public: bytes) -> str:
    """For people to compare: 150 bits of the SHA-256 of both keys, in base32 (RFC 4648), 6 groups of 5."""
    letters = base64.b32encode(hashlib.sha256(public + link_public).digest()).decode()
    return "-".join(letters[start : start + 5] for start in range(0, 30, 5))


def generate_identity(name: str) -> Identity:
    """A fresh key pair, kept nowhere."""
    return _identity(name, X25519PrivateKey.generate())


def create_identity(directory: Path, name: str, invitation: str | None = None) -> Identity:
    """Make a key; write `<name>.key` (mode 0600) and `<name>.card` to `directory`. Overwrites nothing.

    `invitation`: the id of the invitation that the card answers.
    """
    _check_name(name)
    identity = generate_identity(name)
    key_path, card_path = directory / f"{name}.key", directory / f"{name}.card"
    if card_path.exists():
        raise KeyFileError(f"{card_path} exists already: choose another name or folder")
    # Not through _PrivateKey: its SecretStr would be written as asterisks.
    key = {"version": 1, "name": name, "private_key": identity.private.private_bytes_raw().hex()}
    create(key_path, json.dumps(key, indent=1), mode=0o600)
    create(card_path, card_of(identity, invitation).model_dump_json(indent=1), mode=0o644)
    return identity


def load_identity(path: Path) -> Identity:
    """Read a `.key` file. Raises KeyFileError also if anyone but its owner may read or write it."""
    file = parse(path, _PrivateKey, private=True)
    try:
        private = X25519PrivateKey.from_private_bytes(bytes.fromhex(file.private_key.get_secret_value()))
    except ValueError:
        raise KeyFileError(f"{path}: private_key: 64 hexadecimal digits are due") from None
    return _identity(file.name, private)


def card_of(identity: Identity, invitation: str | None = None) -> Card:
    return Card(
        name=identity.name,
        public_key=identity.public.hex(),
        link_key=identity.link.public.hex(),
        fingerprint=fingerprint(identity.public, identity.link.public),
        invitation=invitation,
    )


def load_card(path: Path) -> Card:
    card = parse(path, Card)
    if card.fingerprint != fingerprint(card.public, card.link_public):
        raise KeyFileError(f"{path}: the fingerprint does not belong to the public keys: ask for the card again")
    return card


def _identity(name: str, private: X25519PrivateKey) -> Identity:
    derive = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"flglm link key, CURVE, version 1")
    link = LinkKeys.from_secret(derive.derive(private.private_bytes_raw()))
    return Identity(name, private, private.public_key().public_bytes_raw(), link)


def _check_name(name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise KeyFileError(
            f"{name!r} is no name: 1 to 64 of a-z, 0-9, dot, dash and underscore, a letter or digit first"
        ) from None
