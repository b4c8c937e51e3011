"""The files that people hold: private keys, cards, the folder of admitted cards, and invitations.

    <name>.key    a private key; only its owner can read it, and it never leaves its machine
    <name>.card   the public key with its fingerprint; sent to whoever shall admit its owner
    a folder of cards is an allow list: adding a card admits, removing it revokes, at once
    an invitation names the broker, the server with its public key, and the job; without it a client connects nowhere

Each is JSON with a `version`. What is corrupt, incomplete or of another version raises KeyFileError, which names the
file and never shows what a private key file holds.
"""

import base64
import hashlib
import json
import os
import shlex
import tempfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from shared.errors import KeyFileError
from shared.wire.envelope import Name

MAX_FILE_BYTES = 64 * 1024

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BrokerAddress = Annotated[str, Field(pattern=r"^tcp://[^\s/]{1,255}:[0-9]{1,5}$")]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1


class _KeyFile(_File):
    name: Name
    private_key: SecretStr


class Card(_File):
    """What the others may know of a person or machine: name, X25519 public key and its fingerprint."""

    name: Name
    public_key: Hex32
    fingerprint: str

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return bytes.fromhex(self.public_key)


class Invitation(_File):
    """Where a client connects, whose server it trusts there, and for which job. `expires_at` has a time zone."""

    client: Name
    brokers: Annotated[list[BrokerAddress], Field(min_length=1, max_length=16)]
    server: Name
    server_public_key: Hex32
    job: Hex32
    expires_at: AwareDatetime

    @property
    def server_public(self) -> bytes:
        """The server's X25519 public key, 32 bytes."""
        return bytes.fromhex(self.server_public_key)

    @property
    def job_digest(self) -> bytes:
        """The SHA-256 of the job, 32 bytes."""
        return bytes.fromhex(self.job)


@dataclass(frozen=True)
class Identity:
    """A name with its X25519 private key and public key (32 bytes)."""

    name: str
    private: X25519PrivateKey = field(repr=False)
    public: bytes


def key_digest(public: bytes) -> bytes:
    """SHA-256 of a public key, 32 bytes: what a server is called by in routing headers."""
    return hashlib.sha256(public).digest()


def fingerprint(public: bytes) -> str:
    """For people to compare: 150 bits of the key's SHA-256, in base32 (RFC 4648), 6 groups of 5."""
    letters = base64.b32encode(key_digest(public)).decode()
    return "-".join(letters[start : start + 5] for start in range(0, 30, 5))


def generate_identity(name: str) -> Identity:
    """A fresh key pair, kept nowhere."""
    return _identity(name, X25519PrivateKey.generate())


def create_identity(directory: Path, name: str) -> Identity:
    """Make a key; write `<name>.key` (mode 0600) and `<name>.card` to `directory`. Overwrites nothing."""
    _check_name(name)
    identity = generate_identity(name)
    card = _card(identity)
    key_path, card_path = directory / f"{name}.key", directory / f"{name}.card"
    if card_path.exists():
        raise KeyFileError(f"{card_path} exists already: choose another name or folder")
    # Not through _KeyFile: its SecretStr would be written as asterisks.
    key = {"version": 1, "name": name, "private_key": identity.private.private_bytes_raw().hex()}
    _create(key_path, json.dumps(key, indent=1), mode=0o600)
    _create(card_path, card.model_dump_json(indent=1), mode=0o644)
    return identity


def load_identity(path: Path) -> Identity:
    """Read a `.key` file. Raises KeyFileError also if anyone but its owner may read or write it."""
    file = _parse(path, _KeyFile, private=True)
    try:
        private = X25519PrivateKey.from_private_bytes(bytes.fromhex(file.private_key.get_secret_value()))
    except ValueError:
        raise KeyFileError(f"{path}: private_key: 64 hexadecimal digits are due") from None
    return _identity(file.name, private)


def load_card(path: Path) -> Card:
    card = _parse(path, Card)
    if card.fingerprint != fingerprint(card.public):
        raise KeyFileError(f"{path}: the fingerprint does not belong to the public key: ask for the card again")
    return card


def admit(card_path: Path, directory: Path) -> Card:
    """Put a card on the allow list `directory`. The same card again changes nothing.

    Raises KeyFileError if its name or its key is on the list already, with another key or name.
    """
    card = load_card(card_path)
    present = {other.public: other.name for other in (_cards(directory) if directory.exists() else {}).values()}
    if present.get(card.public) == card.name:
        return card
    if card.public in present:
        raise KeyFileError(f"{card_path}: its key is admitted already, as {present[card.public]}")
    if card.name in present.values():
        raise KeyFileError(f"{card_path}: another key is admitted as {card.name}: revoke that first")
    _create(directory / f"{card.name}.card", card.model_dump_json(indent=1), mode=0o644)
    return card


def revoke(name: str, directory: Path) -> None:
    """Take `name` off the allow list `directory`. Raises KeyFileError if it is not there."""
    paths = [path for path, card in _cards(directory).items() if card.name == name]
    if not paths:
        raise KeyFileError(f"{directory}: nobody is admitted as {name}")
    try:
        for path in paths:
            path.unlink()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None


class Admitted:
    """The allow list in `directory`, as it is at each look-up (cards are read again only when files have changed)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: list[tuple[str, int, int, int]] | None = None
        self._names: dict[bytes, str] = {}

    def lookup(self, public: bytes) -> str | None:
        """The name that `public` (32 bytes) is admitted under, or None.

        Raises KeyFileError, so admits nobody, as long as a card is corrupt or two cards share a name or a key.
        """
        state = sorted(_stamp(path) for path in _card_paths(self._directory))
        if state != self._seen:
            self._seen = None
            self._names = _names(self._directory)
            self._seen = state
        return self._names.get(public)


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Write a new file that only its owner can read. Raises KeyFileError if `path` exists."""
    _create(path, invitation.model_dump_json(indent=1), mode=0o600)


def load_invitation(path: Path, now: datetime) -> Invitation:
    """Read an invitation. `now` has a time zone. Raises KeyFileError also if it has expired by then."""
    invitation = _parse(path, Invitation)
    if invitation.expires_at <= now:
        raise KeyFileError(
            f"{path}: the invitation expired at {invitation.expires_at:%Y-%m-%d %H:%M %Z}",
            hint="ask the server's operator for a new one, and check this machine's clock",
        )
    return invitation


def _identity(name: str, private: X25519PrivateKey) -> Identity:
    return Identity(name, private, private.public_key().public_bytes_raw())


def _card(identity: Identity) -> Card:
    return Card(name=identity.name, public_key=identity.public.hex(), fingerprint=fingerprint(identity.public))


def _check_name(name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise KeyFileError(
            f"{name!r} is no name: 1 to 64 of a-z, 0-9, dot, dash and underscore, a letter or digit first"
        ) from None


def _card_paths(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise KeyFileError(f"{directory} is no folder of cards")
    return sorted(directory.glob("*.card"))


def _cards(directory: Path) -> dict[Path, Card]:
    return {path: load_card(path) for path in _card_paths(directory)}


def _stamp(path: Path) -> tuple[str, int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    return path.name, status.st_mtime_ns, status.st_size, status.st_ino


def _names(directory: Path) -> dict[bytes, str]:
    names: dict[bytes, str] = {}
    for path, card in _cards(directory).items():
        if card.public in names or card.name in names.values():
            raise KeyFileError(f"{path}: {card.name}, or its key, is admitted by another card too: remove one")
        names[card.public] = card.name
    return names


File = TypeVar("File", bound=_File)


def _parse(path: Path, schema: type[File], *, private: bool = False) -> File:
    try:
        return schema.model_validate_json(_read(path, private=private))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KeyFileError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None


def _read(path: Path, *, private: bool) -> bytes:
    try:
        with path.open("rb") as file:
            if private and os.fstat(file.fileno()).st_mode & 0o077:
                raise KeyFileError(f"{path} is open to others: type chmod 600 {shlex.quote(str(path))}")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileError(f"{path} is too long for such a file: more than {MAX_FILE_BYTES} bytes")
    return content


def _create(path: Path, content: str, *, mode: int) -> None:
    """Write a new file, which nobody can see half written or, under any name, with other permissions than `mode`."""
    _make_folder(path.parent)
    try:
        descriptor, draft = tempfile.mkstemp(prefix=".", suffix=".draft", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(content + "\n")
                file.flush()
                os.fsync(descriptor)
            os.chmod(draft, mode)
            # A link, unlike a rename, replaces nothing.
            os.link(draft, path)
        finally:
            os.unlink(draft)
    except FileExistsError:
        raise KeyFileError(f"{path} exists already: choose another name or folder") from None
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeyFileError(f"{directory}: {error.strerror}") from None
