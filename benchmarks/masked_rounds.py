"""Secure sums played in one process: every client one after the other, every message through msgpack and its schema.

For tests, and for `benchmarks.secagg`, which reads the times and bytes off the `Meter`.
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgpack
import numpy as np
from pydantic import TypeAdapter

from shared.identity import Identity, card_of, generate_identity
from shared.payload.schema import Message
from shared.secure_aggregation.client import Client
from shared.secure_aggregation.fixed_point import Floats, Words
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.messages import CLIENT_MESSAGES, SERVER_MESSAGES
from shared.secure_aggregation.ring import RingMember, RingServer
from shared.secure_aggregation.server import MaskedSum, Server
from shared.secure_aggregation.terms import Member, RingTerms, SumTerms, Terms, roster

SERVER = -1
Update = Callable[[int], tuple[Floats, int]]
M = TypeVar("M", bound=Message)


@dataclass
class Meter:
    """Seconds by client (the server is SERVER), and bytes sent and received by client."""

    seconds: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    sent: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    received: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def timed(self, who: int) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[who] += time.perf_counter() - began

    def up(self, client: int, message: M, frame: Words | None = None) -> M:
        """The message as the server gets it."""
        return self._across(message, frame, CLIENT_MESSAGES, client, (client, SERVER), self.sent)

    def down(self, client: int, message: M, frame: Words | None = None) -> M:
        """The message as the client gets it."""
        return self._across(message, frame, SERVER_MESSAGES, client, (SERVER, client), self.received)

    def _across(
        self,
        message: M,
        frame: Words | None,
        schema: TypeAdapter[Any],
        client: int,
        ends: tuple[int, int],
        counter: dict[int, int],
    ) -> M:
        sender, receiver = ends
        with self.timed(sender):
            packed: bytes = msgpack.packb(message.model_dump())
        counter[client] += len(packed) + (0 if frame is None else frame.nbytes)
        with self.timed(receiver):
            came: M = schema.validate_python(msgpack.unpackb(packed, strict_map_key=True, use_list=False))
        return came


def people(count: int) -> tuple[list[Identity], tuple[Member, ...]]:
    """Fresh identities and their roster; the identity at a place has that number."""
    identities = [generate_identity(f"client-{number:05}") for number in range(count)]
    return identities, roster([card_of(identity) for identity in identities])


def label(what: str) -> str:
    return hashlib.sha256(what.encode()).hexdigest()


def off_by(terms: SumTerms, made: MaskedSum, update: Update) -> tuple[float, float]:
    """The largest difference to the plain mean of the clipped updates, summed in float64; what is allowed."""
    mean, weight = made.mean(terms)
    plain = np.zeros(terms.length)
    plain_weight = 0
    for client in made.contributors:
        values, own = update(client)
        plain += np.clip(values.astype(np.float64), -terms.encoding.clip, terms.encoding.clip) * own
        plain_weight += own
    if weight != plain_weight:
        return float("inf"), 0.0
    error = float(np.abs(mean - plain / plain_weight).max())
    return error, terms.encoding.largest_error(len(made.contributors), weight)


@dataclass
class Round:
    """One sum by SecAgg or SecAgg+. `gone` are the clients that no longer answer, phase by phase.

    `pair_masks`: how many masks the server had to compute for those that dropped out.
    """

    terms: Terms
    clients: Mapping[int, Client]
    server: Server
    meter: Meter
    gone: set[int] = field(default_factory=set)
    pair_masks: int = 0

    @classmethod
    def of(
        cls,
        terms: Terms,
        identities: Sequence[Identity],
        meter: Meter | None = None,
        group: GroupKey | None = None,
    ) -> "Round":
        meter = meter or Meter()
        clients = {}
        for number, identity in enumerate(identities):
            with meter.timed(number):
                clients[number] = Client(terms, identity, group=group)
        return cls(terms, clients, Server(terms), meter)

    def advertise(self, drop: Collection[int] = ()) -> None:
        self.gone |= set(drop)
        for number in self._there(self.clients):
            with self.meter.timed(number):
                message = self.clients[number].advertise_keys()
            message = self.meter.up(number, message)
            with self.meter.timed(SERVER):
                self.server.advertise_keys(number, message)

    def share(self, drop: Collection[int] = ()) -> None:
        with self.meter.timed(SERVER):
            key_list = self.server.close_advertising()
        advertised = [entry.client for entry in key_list.keys]
        self.gone |= set(drop)
        for number in self._there(advertised):
            came = self.meter.down(number, key_list)
            with self.meter.timed(number):
                message = self.clients[number].share_keys(came)
            message = self.meter.up(number, message)
            with self.meter.timed(SERVER):
                self.server.share_keys(number, message)

    def mask(self, update: Update, drop: Collection[int] = ()) -> None:
        with self.meter.timed(SERVER):
            relayed = self.server.close_sharing()
        self.gone |= set(drop)
        for number in self._there(relayed):
            came = self.meter.down(number, relayed[number])
            values, weight = update(number)
            with self.meter.timed(number):
                message, words = self.clients[number].mask_input(came, values, weight)
            message = self.meter.up(number, message, words)
            with self.meter.timed(SERVER):
                self.server.masked_input(number, message, words.data)

    def unmask(self, drop: Collection[int] = ()) -> MaskedSum:
        with self.meter.timed(SERVER):
            requests = self.server.close_inputs()
        self.pair_masks = sum(len(request.dropped) for request in requests.values())
        self.gone |= set(drop)
        for number in self._there(requests):
            came = self.meter.down(number, requests[number])
            with self.meter.timed(number):
                message = self.clients[number].unmask(came)
            message = self.meter.up(number, message)
            with self.meter.timed(SERVER):
                self.server.unmask(number, message)
        with self.meter.timed(SERVER):
            return self.server.finish()

    def _there(self, clients: Collection[int]) -> list[int]:
        return [number for number in sorted(clients) if number not in self.gone]


def play_round(
    terms: Terms,
    identities: Sequence[Identity],
    update: Update,
    drops: Mapping[str, Collection[int]],
    meter: Meter | None = None,
    group: GroupKey | None = None,
) -> tuple[Round, MaskedSum]:
    """A whole sum; `drops` says who no longer answers from `advertise`, `share`, `mask` or `unmask` on."""
    played = Round.of(terms, identities, meter, group)
    played.advertise(drops.get("advertise", ()))
    played.share(drops.get("share", ()))
    played.mask(update, drops.get("mask", ()))
    return played, played.unmask(drops.get("unmask", ()))


@dataclass
class Ring:
    """A ring whose keys are advertised."""

    members: Mapping[int, RingMember]
    server: RingServer
    meter: Meter

    @classmethod
    def of(
        cls,
        terms: RingTerms,
        identities: Sequence[Identity],
        meter: Meter | None = None,
        group: GroupKey | None = None,
    ) -> "Ring":
        meter = meter or Meter()
        ring = cls({}, RingServer(terms), meter)
        members = {}
        for number, identity in enumerate(identities):
            members[number] = RingMember(terms, identity, group=group)
            ring.server.advertise_key(number, meter.up(number, members[number].advertise_key()))
        everybody = ring.server.close_advertising()
        for number, member in members.items():
            member.connect(meter.down(number, everybody))
        ring.members = members
        return ring

    def attempt(self, among: Collection[int], update: Update, drop: Collection[int] = ()) -> MaskedSum:
        """One sum among these, `drop` of whom do not answer."""
        with self.meter.timed(SERVER):
            asked = self.server.start(among)
        for number in sorted(set(among) - set(drop)):
            came = self.meter.down(number, asked)
            values, weight = update(number)
            with self.meter.timed(number):
                message, words = self.members[number].mask_input(came, values, weight)
            message = self.meter.up(number, message, words)
            with self.meter.timed(SERVER):
                self.server.masked_input(number, message, words.data)
        with self.meter.timed(SERVER):
            return self.server.finish()
