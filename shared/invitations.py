"""Invitations: what a client needs to find and trust the others. Each admits one card.

The operator keeps a note `<id>.invited` beside the cards that it admits; the card that answers the invitation takes it.
"""

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from shared.errors import KeyFileError
from shared.identity import Card
from shared.key_files import Hex16, Hex32, KeyFile, create, parse, remove
from shared.wire.curve import Door, is_local
from shared.wire.envelope import Name

BrokerAddress = Annotated[str, Field(pattern=r"^(tcp://[^\s/]{1,255}:[0-9]{1,5}|ipc://[^\s]{1,100})$")]


class BrokerAt(BaseModel):
    """Where a broker listens to clients, and its links' public key. None, a plain link, only on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    address: BrokerAddress
    key: Hex32 | None = None

    @model_validator(mode="after")
    def _plain_stays_here(self) -> Self:
        if self.key is None and not is_local(self.address):
            raise ValueError(f"a plain link to {self.address} would leave this machine: the broker's key is missing")
        return self

    @property
    def door(self) -> Door:
        return Door(self.address, None if self.key is None else bytes.fromhex(self.key))


class Invitation(KeyFile):
    """Where a client connects, whose server it trusts there, and for which job. `expires_at` has a time zone."""

    id: Hex16
    client: Name
    brokers: Annotated[list[BrokerAt], Field(min_length=1, max_length=16)]
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


class _Invited(KeyFile):
    """The operator's note."""

    client: Name
    expires_at: AwareDatetime


def new_id() -> str:
    return os.urandom(16).hex()


def write_invitation(path: Path, invitation: Invitation, directory: Path | None) -> None:
    """Write a new file that only its owner can read, and the note to `directory`, unless no card is to answer it.

    Raises KeyFileError.
    """
    create(path, invitation.model_dump_json(indent=1), mode=0o600)
    if directory is None:
        return
    note = _Invited(client=invitation.client, expires_at=invitation.expires_at)
    create(_note(directory, invitation.id), note.model_dump_json(indent=1), mode=0o600)


def load_invitation(path: Path, now: datetime) -> Invitation:
    """Read an invitation. `now` has a time zone. Raises KeyFileError also if it has expired by then."""
    invitation = parse(path, Invitation)
    if invitation.expires_at <= now:
        raise KeyFileError(
            f"{path}: the invitation expired at {invitation.expires_at:%Y-%m-%d %H:%M %Z}",
            hint="ask the server's operator for a new one, and check this machine's clock",
        )
    return invitation


def redeem(card: Card, directory: Path, now: datetime) -> None:
    """Use up the invitation that `card` answers. Raises KeyFileError if that cannot be, or not any more."""
    assert card.invitation is not None
    path = _note(directory, card.invitation)
    if not path.exists():
        raise KeyFileError(
            f"the invitation that {card.name}'s card answers was used already, or is not from here",
            hint="each admits one card: write a new one with 'flglm invite'",
        )
    note = parse(path, _Invited)
    if note.client != card.name:
        raise KeyFileError(f"the card of {card.name} answers the invitation of {note.client}: it is not for both")
    if note.expires_at <= now:
        raise KeyFileError(f"the invitation of {card.name} expired at {note.expires_at:%Y-%m-%d %H:%M %Z}")
    remove(path)


def _note(directory: Path, id: str) -> Path:
    return directory / f"{id}.invited"
