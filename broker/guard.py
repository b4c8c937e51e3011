"""Who may come through the broker's doors: CURVE keys on two allow lists, one for clients, one for servers.

ZeroMQ asks before it lets a connection in (ZAP); the lists are looked at again while connections last, so that whoever
is taken off is out.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from shared.allow_list import AllowList
from shared.errors import KeyFileError
from shared.identity import key_digest
from shared.logs import event
from shared.wire.curve import LinkKeys

Side = Literal["client", "server"]
SIDES: tuple[Side, ...] = get_args(Side)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guest:
    """Who is behind a connection: the name on the card, and the digest by which routing headers call its key."""

    name: str
    identity: bytes


Guests = Mapping[str, Guest]
"""By ZeroMQ's `User-Id`: the link key in Z85."""


class GuestList:
    """The cards of one side. As long as the folder cannot be read, who was admitted last stays; nobody new comes."""

    def __init__(self, side: Side, folder: Path) -> None:
        self.side = side
        self.cards = AllowList(folder)
        self._seen: object = None
        self._guests: Guests = {}
        self._complaint = ""

    def guests(self) -> Guests:
        try:
            cards = self.cards.cards()
        except KeyFileError as error:
            if error.message != self._complaint:
                self._complaint = error.message
                event(logger, "admissions_unreadable", level=logging.ERROR, side=self.side, reason=error.message)
            return self._guests
        self._complaint = ""
        if cards is not self._seen:
            self._seen = cards
            self._guests = {
                z85.encode(card.link_public).decode(): Guest(card.name, key_digest(card.public))
                for card in cards.values()
            }
        return self._guests


class Guard:
    """The broker's keys and lists; `clients` and `servers` are folders of cards. Raises KeyFileError if unreadable."""

    def __init__(self, keys: LinkKeys, clients: Path, servers: Path) -> None:
        self.keys = keys
        self.folders: dict[Side, Path] = {"client": clients, "server": servers}
        self.lists = {side: GuestList(side, folder) for side, folder in self.folders.items()}
        for listed in self.lists.values():
            listed.cards.cards()

    def guests(self) -> dict[Side, Guests]:
        """Who is admitted now. For one thread."""
        return {side: listed.guests() for side, listed in self.lists.items()}

    def authenticator(self, context: "zmq.Context[zmq.Socket[bytes]]") -> ThreadAuthenticator:
        """A running one: it answers ZeroMQ's questions in a thread of its own. `stop()` ends it."""
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        for side in SIDES:
            authenticator.configure_curve_callback(domain=side, credentials_provider=_Door(side, self.folders[side]))
        return authenticator


class _Door:
    """What pyzmq calls for each connection."""

    def __init__(self, side: Side, folder: Path) -> None:
        self.list = GuestList(side, folder)

    def callback(self, domain: str, key: bytes) -> bool:
        admitted = key.decode("ascii") in self.list.guests()
        if not admitted:
            event(logger, "stranger_refused", level=logging.WARNING, side=self.list.side)
        return admitted
