"""Simulated clients: state machines that a crowd's one thread drives. Real sockets, keys and seals; no model.

    start ──greeted──> OPEN ──ACCEPT, Welcome──> Join ──RoundStart──> think, Forward, Backward, ... Update ──> ...

A client whose session or connection ended comes back with a new one after `BACK_S`.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import zmq

from loadtest.batches import Batch
from loadtest.counts import Counts
from loadtest.malice import Malice
from loadtest.plan import Plan
from shared import PROTOCOL_VERSION
from shared.errors import ConnectionFailed, FlglmError
from shared.identity import Identity, key_digest
from shared.payload.messages import (
    Backward,
    Confirm,
    Finished,
    Forward,
    Gradient,
    Hidden,
    Join,
    Leave,
    Message,
    Refusal,
    RoundStart,
    Update,
    Welcome,
    pack,
    unpack_from_server,
)
from shared.secure.handshake import ClientHandshake
from shared.secure.records import Channel
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Accept, Close, Data, Envelope, Frame, Open
from shared.wire.envelope import pack as pack_envelope

Kind = Literal["steady", "churning", "slow", "malicious"]

BACK_S = 0.5
NO_ANSWER_S = 120.0
# A burst of garbage goes out together, a tenth of a second's worth.
BURSTS_PER_S = 10


@dataclass(frozen=True)
class World:
    """What all members share. `later(when, action)` calls `action(now)` at that time."""

    context: "zmq.Context[zmq.Socket[bytes]]"
    door: Door
    server: bytes
    job: bytes
    plan: Plan
    batches: Sequence[Batch]
    counts: Counts
    later: Callable[[float, Callable[[float], None]], None]
    connected: Callable[["Member"], None]
    disconnected: Callable[["Member"], None]


class Asked(NamedTuple):
    """A request that waits for its answer."""

    kind: str
    at: float


class Member:
    """`kind` says how it behaves. `state`: where it stands, for the crowd to count."""

    def __init__(self, world: World, identity: Identity, kind: Kind, seed: int) -> None:
        self.world = world
        self.identity = identity
        self.kind = kind
        self.chance = random.Random(seed)
        self.think_s = world.plan.think_s * self.chance.lognormvariate(0, world.plan.pace_spread)
        self.connection: BrokerConnection | None = None
        self.life = 0
        self._forget()

    @property
    def state(self) -> Literal["away", "connecting", "waiting", "training"]:
        if self.connection is None:
            return "away"
        if self.channel is None:
            return "connecting"
        return "waiting" if self.round is None else "training"

    # A connection's life

    def start(self, now: float) -> None:
        self._forget()
        self.connection = BrokerConnection(self.world.context, self.world.door, hello("client"), self.identity.link)
        self.connection.start()
        self.heard_at = now
        self.world.connected(self)

    def end(self) -> None:
        """Without a word. What was to be done in this connection is off."""
        self.life += 1
        if self.connection is not None:
            self.world.disconnected(self)
            self.connection.socket.close(0)
            self.connection = None

    def leave(self) -> None:
        """In good order."""
        if self.connection is not None and self.connection.up:
            if self.channel is not None:
                self._say(Leave())
            self.connection.close_politely()
            self.world.disconnected(self)
            self.connection.__exit__(None, None, None)
            self.connection = None
        self.end()

    def turn(self, now: float) -> None:
        """Read what came."""
        try:
            while self.connection is not None and (envelope := self.connection.receive(now)) is not None:
                self.heard_at = now
                self._receive(envelope, now)
        except FlglmError as error:
            self._broke(error.code, now)

    def tick(self, now: float) -> None:
        """Once in a while: greet, ping, see whether anybody is there."""
        connection = self.connection
        if connection is None:
            return
        try:
            connection.check_door()
            if connection.up:
                connection.tick(now)
            else:
                connection.greet_again(now)
        except FlglmError as error:
            self._broke(error.code, now)
            return
        if any(now - asked.at > NO_ANSWER_S for asked in self.asked.values()):
            self._broke("no_answer", now)

    def _forget(self) -> None:
        self.channel: Channel | None = None
        self.handshake: ClientHandshake | None = None
        self.session = b""
        self.round: int | None = None
        self.step = 0
        self.request = 0
        self.batch: Batch | None = None
        self.asked: dict[int, Asked] = {}
        self.heard_at = 0.0

    def _broke(self, code: str, now: float) -> None:
        if self.kind != "malicious":
            self.world.counts.errors[code] += 1
        self.end()
        self._soon(now, BACK_S, self.start)

    def _soon(self, now: float, delay_s: float, action: Callable[[float], None]) -> None:
        """Unless this connection is over by then."""
        self.world.later(now + delay_s, partial(self._if_alive, self.life, action))

    def _if_alive(self, life: int, action: Callable[[float], None], now: float) -> None:
        if life == self.life:
            try:
                action(now)
            except FlglmError as error:
                self._broke(error.code, now)

    # What comes

    def _receive(self, envelope: Envelope, now: float) -> None:
        header = envelope.header
        if isinstance(header, Close):
            self._closed(header, now)
        elif isinstance(header, Accept) and self.handshake is not None and header.session == self.session:
            self.channel, _ = self.handshake.finish(bytes(envelope.body[0]))
            self.handshake = None
        elif isinstance(header, Data) and self.channel is not None:
            message, frames = unpack_from_server(self.channel.open(envelope))
            self.world.counts.sums["bytes_down"] += sum(memoryview(frame).nbytes for frame in frames)
            self._handle(message, now)

    def _closed(self, close: Close, now: float) -> None:
        if close.code == "no_such_server":
            self._soon(now, BACK_S, self.greet)
        elif close.session in (None, self.session):
            self._broke(f"closed_{close.code}", now)

    def greet(self, now: float) -> None:
        """Ask for a session."""
        assert self.connection is not None
        self.session = os.urandom(16)
        server = self.world.server
        header = Open(version=PROTOCOL_VERSION, session=self.session, server=key_digest(server), job=self.world.job)
        self.handshake = ClientHandshake(self.identity.private, server, header)
        self.asked = {0: Asked("handshake", now)}
        self.connection.send(pack_envelope(header, [self.handshake.message_1]))

    def _handle(self, message: Message, now: float) -> None:
        match message:
            case Welcome():
                self.asked = {}
                self.world.counts.sums["sessions"] += 1
                self._say(Confirm())
                self._open(now)
            case RoundStart():
                self.round, self.step = message.round, 0
                self._think(now)
            case Hidden():
                if self._answered(message.request, now) == "evaluate":
                    self._evaluate_soon(now)
                else:
                    self._backward(message.request, now)
            case Gradient():
                self._answered(message.request, now)
                self.world.counts.sums["steps"] += 1
                self.step += 1
                if self.step < self.world.plan.local_steps:
                    self._think(now)
                else:
                    # Answered when all others have done their steps: that takes as long as it takes.
                    self._say(Update(request=self._next(), round=self.round or 0, weight=1))
            case Refusal():
                self._refused(message, now)
            case Finished():
                self.leave()

    def _open(self, now: float) -> None:
        """The session is open."""
        if self.kind == "malicious":
            assert self.channel is not None
            malice = Malice(self.chance, self.session, self.channel)
            self._soon(now, 0, partial(self._attack, malice))
            return
        if self.kind == "churning":
            self._soon(now, self.chance.expovariate(1 / self.world.plan.stay_s), self._go)
        if self.kind == "slow":
            self._evaluate_soon(now)
        else:
            self._join(now)

    def _refused(self, refusal: Refusal, now: float) -> None:
        if self.kind == "malicious":
            return
        self.world.counts.errors[f"refused_{refusal.code}"] += 1
        asked = self.asked.pop(refusal.request or 0, None)
        again = self._evaluate if asked is not None and asked.kind == "evaluate" else self._join
        self._soon(now, BACK_S, again)

    # What it does

    def _join(self, now: float) -> None:
        self.round = None
        self._say(Join(request=self._next(), rows=1))
        self._evaluate_soon(now)

    def _think(self, now: float) -> None:
        self._soon(now, self._pause_s(), self._forward)

    def _evaluate_soon(self, now: float) -> None:
        self._soon(now, self._pause_s(), self._evaluate)

    def _pause_s(self) -> float:
        return self.chance.expovariate(1 / self.think_s) if self.think_s else 0.0

    def _forward(self, now: float) -> None:
        self.batch = batch = self.chance.choice(self.world.batches)
        info, frame = batch.hidden
        message = Forward(
            request=self._next(), purpose="train", round=self.round or 0, step=self.step, lengths=batch.lengths,
            target_tokens=batch.tokens, tensors=(info,),
        )  # fmt: skip
        self._ask("forward", message, now, frame)

    def _backward(self, forward: int, now: float) -> None:
        assert self.batch is not None
        info, frame = self.batch.gradient
        self._ask("backward", Backward(request=self._next(), forward=forward, tensors=(info,)), now, frame)

    def _evaluate(self, now: float) -> None:
        """Only as long as no round has begun."""
        if self.round is None:
            batch = self.chance.choice(self.world.batches)
            info, frame = batch.hidden
            message = Forward(
                request=self._next(), purpose="evaluate", lengths=batch.lengths, target_tokens=batch.tokens,
                wants_gradient=False, tensors=(info,),
            )  # fmt: skip
            self._ask("evaluate", message, now, frame)

    def _go(self, now: float) -> None:
        """Leave, in good order or not, and come back later."""
        if self.chance.random() < 0.5:
            self.leave()
        else:
            self.end()
        self.world.counts.sums["departures"] += 1
        self._soon(now, self.chance.expovariate(4 / self.world.plan.stay_s), self.start)

    def _attack(self, malice: Malice, now: float) -> None:
        assert self.connection is not None
        for _ in range(max(1, round(self.world.plan.malice_per_s / BURSTS_PER_S))):
            kind = self.chance.choice(list(malice.kinds))
            try:
                self.connection.socket.send_multipart(malice.kinds[kind](), zmq.DONTWAIT)
            except zmq.Again:
                break
            self.world.counts.sums["malicious_messages"] += 1
        self._soon(now, 1 / BURSTS_PER_S, partial(self._attack, malice))

    # Requests and answers

    def _next(self) -> int:
        self.request += 1
        return self.request

    def _ask(self, kind: str, message: Forward | Backward, now: float, frame: Frame) -> None:
        self.asked[message.request] = Asked(kind, now)
        self._say(message, frame)
        if isinstance(message, Forward):
            self.world.counts.sums["tokens"] += sum(message.lengths)

    def _say(self, message: Message, *frames: Frame) -> None:
        if self.channel is None or self.connection is None:
            raise ConnectionFailed("no session is open")
        self.connection.send(self.channel.seal(pack(message, frames)))
        self.world.counts.sums["bytes_up"] += sum(memoryview(frame).nbytes for frame in frames)

    def _answered(self, request: int, now: float) -> str:
        """What kind of request it was."""
        asked = self.asked.pop(request)
        self.world.counts.latencies[asked.kind].add(now - asked.at)
        self.world.counts.sums["requests"] += 1
        return asked.kind
