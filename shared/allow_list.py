"""Who is admitted: a folder of cards. Adding a card admits, removing it revokes, at once, also who is connected."""

import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from shared.errors import KeyFileError
from shared.identity import Card, load_card
from shared.invitations import redeem
from shared.key_files import create, remove


def admit(card_path: Path, directory: Path, now: datetime) -> Card:
    """Put a card on the allow list `directory`, using up the invitation that it answers. Once more changes nothing.

    Raises KeyFileError if its name or a key of it is on the list already, with another key or name, or if the
    invitation is used up, expired or somebody else's.
    """
    card = load_card(card_path)
    present = list(_cards(directory).values()) if directory.exists() else []
    for other in present:
        if (other.name, other.public, other.link_public) == (card.name, card.public, card.link_public):
            return card
    for other in present:
        if other.public == card.public or other.link_public == card.link_public:
            raise KeyFileError(f"{card_path}: its key is admitted already, as {other.name}")
        if other.name == card.name:
            raise KeyFileError(f"{card_path}: another key is admitted as {card.name}: revoke that first")
    if card.invitation is not None:
        redeem(card, directory, now)
    create(directory / f"{card.name}.card", card.model_dump_json(indent=1), mode=0o644)
    return card


def revoke(name: str, directory: Path) -> None:
    """Take `name` off the allow list `directory`. Raises KeyFileError if it is not there."""
    paths = [path for path, card in _cards(directory).items() if card.name == name]
    if not paths:
        raise KeyFileError(f"{directory}: nobody is admitted as {name}")
    for path in paths:
        remove(path)


# A card that was edited in place, or came in the same tick of the clock as another, is seen after so long at most;
# one that was added or removed at once, since that changes the folder.
LOOK_S = 0.5


class AllowList:
    """The cards in `directory`, as they are at each look-up, read again only when something has changed.

    Thousands of cards are looked at a few times a second, however often they are asked for.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen: list[tuple[str, int, int, int]] | None = None
        self._folder_changed = 0
        self._looked_at = 0.0
        self._admitted: dict[bytes, Card] = {}

    def cards(self) -> Mapping[bytes, Card]:
        """Cards by public key (32 bytes).

        Raises KeyFileError, so admits nobody new, as long as a card is corrupt or two cards share a name or a key.
        """
        changed, now = _changed(self.directory), time.monotonic()
        if self._seen is not None and changed == self._folder_changed and now - self._looked_at < LOOK_S:
            return self._admitted
        state = _stamps(self.directory)
        if state != self._seen:
            self._seen = None
            self._admitted = _unambiguous(self.directory)
            self._seen = state
        self._folder_changed, self._looked_at = changed, now
        return self._admitted

    def names(self) -> Mapping[bytes, str]:
        """Names by public key."""
        return {public: card.name for public, card in self.cards().items()}


def _card_paths(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise KeyFileError(f"{directory} is no folder of cards")
    return sorted(directory.glob("*.card"))


def _cards(directory: Path) -> dict[Path, Card]:
    return {path: load_card(path) for path in _card_paths(directory)}


def _changed(directory: Path) -> int:
    try:
        return directory.stat().st_mtime_ns
    except OSError:
        raise KeyFileError(f"{directory} is no folder of cards") from None


def _stamps(directory: Path) -> list[tuple[str, int, int, int]]:
    """What changes with a card's file: name, time, size, place."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".card")]
    except OSError as error:
        raise KeyFileError(f"{directory}: {error.strerror}") from None
    return sorted((name, status.st_mtime_ns, status.st_size, status.st_ino) for name, status in found)


def _unambiguous(directory: Path) -> dict[bytes, Card]:
    cards: dict[bytes, Card] = {}
    taken: set[str | bytes] = set()
    for path, card in _cards(directory).items():
        own: set[str | bytes] = {card.name, card.public, card.link_public}
        if own & taken:
            raise KeyFileError(f"{path}: {card.name}, or its key, is admitted by another card too: remove one")
        taken |= own
        cards[card.public] = card
    return cards
