"""How much each worker may send: a token bucket of messages and one of bytes for each, filled as time goes by.

Whoever is over is held up alone: its messages wait, in order, up to a limit; beyond that it loses its connection.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Message = TypeVar("Message")


@dataclass(frozen=True)
class Rate:
    """Per second, for each worker; one second's worth may come at once. `waiting`: how many messages may wait."""

    messages: float
    bytes: float
    waiting: int


@dataclass
class _Account(Generic[Message]):
    messages: float
    bytes: float
    at: float
    held: deque[tuple[int, Message]] = field(default_factory=deque)

    def refill(self, rate: Rate, now: float) -> None:
        passed = max(0.0, now - self.at)
        self.at = now
        self.messages = min(rate.messages, self.messages + passed * rate.messages)
        self.bytes = min(rate.bytes, self.bytes + passed * rate.bytes)

    def spend(self, size: int) -> bool:
        """A message may overdraw its account, once: larger ones than a second's worth pass too."""
        if self.messages < 1 or self.bytes <= 0:
            return False
        self.messages -= 1
        self.bytes -= size
        return True


class Throttle(Generic[Message]):
    """Accounts by worker. `take` says whether a message may pass now; `due` hands out those that waited."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._accounts: dict[Hashable, _Account[Message]] = {}
        self._holding: set[Hashable] = set()

    @property
    def holds(self) -> bool:
        return bool(self._holding)

    @property
    def waiting(self) -> int:
        """Messages that wait now; from any thread."""
        return sum(len(account.held) for account in list(self._accounts.values()))

    def take(self, worker: Hashable, size: int, message: Message, now: float) -> bool | None:
        """True: pass it on. False: it waits here. None: too many wait already, and this one is dropped."""
        account = self._accounts.get(worker)
        if account is None:
            account = self._accounts[worker] = _Account(self.rate.messages, self.rate.bytes, now)
        if not account.held:
            account.refill(self.rate, now)
            if account.spend(size):
                return True
        if len(account.held) >= self.rate.waiting:
            return None
        account.held.append((size, message))
        self._holding.add(worker)
        return False

    def due(self, now: float) -> list[Message]:
        """Messages that waited and may pass now, in the order of each worker."""
        passed: list[Message] = []
        for worker in list(self._holding):
            account = self._accounts[worker]
            account.refill(self.rate, now)
            while account.held and account.spend(account.held[0][0]):
                passed.append(account.held.popleft()[1])
            if not account.held:
                self._holding.discard(worker)
        return passed

    def forget(self, keep: Callable[[Hashable], bool]) -> None:
        """Drop the accounts, and what waits in them, of all but `keep`."""
        self._accounts = {worker: account for worker, account in self._accounts.items() if keep(worker)}
        self._holding &= self._accounts.keys()
