"""Who may come through the broker's doors: CURVE keys on two allow lists, one for clients, one for servers.

ZeroMQ asks before it lets a connection in (ZAP); the lists are looked at again while connections last, so that whoever
is taken off is out.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from shared.allow_list import AllowList
from shared.errors import KeyFileError, UsageError
from shared.identity import key_digest, load_identity
from shared.logs import event
from shared.wire.curve import LinkKeys

Side = Literal["client", "server"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guest:
    """Who is behind a connection: the name on the card, and the digest by which routing headers call its key."""

    name: str
    identity: bytes


Guests = Mapping[str, Guest]
"""By ZeroMQ's `User-Id`: the link key in Z85."""


class GuestList:
    """The cards of one door. As long as the folder cannot be read, who was admitted last stays; nobody new comes.

    `known`: who is admitted, as of the last `refresh()`. ZeroMQ's question refreshes it too, so that whoever has been
    let in is known before a message of theirs can come. For several threads.
    """

    def __init__(self, side: Side, folder: Path) -> None:
        """Raises KeyFileError if the folder cannot be read."""
        self.side = side
        self.cards = AllowList(folder)
        self.cards.cards()
        self.known: Guests = {}
        self._seen: object = None
        self._complaint = ""
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> Guests:
        """Look at the folder; `known`."""
        with self._lock:
            try:
                cards = self.cards.cards()
            except KeyFileError as error:
                if error.message != self._complaint:
                    self._complaint = error.message
                    event(logger, "admissions_unreadable", level=logging.ERROR, side=self.side, reason=error.message)
                return self.known
            self._complaint = ""
            if cards is not self._seen:
                self._seen = cards
                self.known = {
                    z85.encode(card.link_public).decode(): Guest(card.name, key_digest(card.public))
                    for card in cards.values()
                }
            return self.known

    def callback(self, domain: str, key: bytes) -> bool:
        """What pyzmq asks for each connection: may this key (Z85) come in?"""
        admitted = key.decode("ascii") in self.refresh()
        if not admitted:
            event(logger, "stranger_refused", level=logging.WARNING, side=self.side)
        return admitted


class Guard:
    """The broker's keys and lists; `clients` and `servers` are folders of cards. Raises KeyFileError if unreadable."""

    def __init__(self, keys: LinkKeys, clients: Path, servers: Path) -> None:
        self.keys = keys
        self.lists: dict[Side, GuestList] = {
            "client": GuestList("client", clients),
            "server": GuestList("server", servers),
        }

    def authenticator(self, context: "zmq.Context[zmq.Socket[bytes]]") -> ThreadAuthenticator:
        """A running one: it answers ZeroMQ's questions in a thread of its own. `stop()` ends it."""
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        for side, listed in self.lists.items():
            authenticator.configure_curve_callback(domain=side, credentials_provider=listed)
        return authenticator


def guard_of(key: Path | None, clients: Path, servers: Path, *, plain: bool) -> Guard | None:
    """What a broker's options ask for: a guard with the key in that file, or None for plain links.

    Raises UsageError unless it is one of the two, KeyFileError.
    """
    if (key is None) != plain:
        raise UsageError("a broker needs --key", hint="make one with 'flglm keys new broker', or say --plain")
    return None if key is None else Guard(load_identity(key).link, clients, servers)
