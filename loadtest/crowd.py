"""One process of a load test: its share of the simulated clients, in one thread with one poller."""

import heapq
import itertools
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from loadtest.batches import make_batches
from loadtest.counts import Counts
from loadtest.members import Kind, Member, World
from loadtest.plan import Plan
from shared.identity import load_card, load_identity
from shared.wire.curve import Door

REPORT_S = 1.0
TICK_S = 0.5
LONGEST_WAIT_S = 0.05
SOCKETS_A_MEMBER = 8  # a DEALER, and while it connects its monitor's pair, with room to spare


@dataclass(frozen=True)
class Scene:
    """Where a load test takes place: folders of keys and cards, and the broker's address for clients."""

    plan: Plan
    keys: Path
    broker: str
    job: bytes


def kinds(plan: Plan) -> list[Kind]:
    """How each client behaves: shuffled, so that every process has some of each."""
    numbers: dict[Kind, int] = {
        "malicious": plan.hostile,
        "slow": plan.slow_clients,
        "churning": round(plan.trainers * plan.churning),
        "steady": plan.clients,
    }
    made = [kind for kind, number in numbers.items() for _ in range(number)][: plan.clients]
    random.Random(plan.seed).shuffle(made)
    return made


def member_name(index: int) -> str:
    return f"member-{index}"


class Crowd:
    """Members `first`, `first` + `every`, ...: every process gets some of those that come early and late."""

    def __init__(self, scene: Scene, first: int, every: int) -> None:
        plan = scene.plan
        indices = range(first, plan.clients, every)
        self.plan = plan
        self.counts = Counts()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, SOCKETS_A_MEMBER * len(indices) + 64)
        self.poller = zmq.Poller()
        self.due: list[tuple[float, int, Callable[[float], None]]] = []
        self.tie = itertools.count()
        self.by_socket: dict[Any, Member] = {}
        self.greeting: set[Member] = set()
        world = World(
            self.context,
            Door(scene.broker, load_card(scene.keys / "broker.card").link_public),
            load_card(scene.keys / "server.card").public,
            scene.job,
            plan,
            make_batches(plan),
            self.counts,
            self._later,
            self._connected,
            self._disconnected,
        )
        behaviours = kinds(plan)
        self.members = {
            index: Member(
                world, load_identity(scene.keys / f"{member_name(index)}.key"), behaviours[index], plan.seed + index
            )
            for index in indices
        }

    def run(self, report: Callable[[dict[str, Any]], None], stopped: Callable[[], bool]) -> None:
        """Let them come, and report every second, until `stopped()`; then all leave."""
        began = time.monotonic()
        for index, member in self.members.items():
            self._later(began + self.plan.ramp_s * index / self.plan.clients, member.start)
        next_tick = next_report = began
        while not stopped():
            now = time.monotonic()
            if now >= next_tick:
                for member in self.members.values():
                    member.tick(now)
                next_tick = now + TICK_S
            if now >= next_report:
                report(self._state(now - began))
                next_report = now + REPORT_S
            while self.due and self.due[0][0] <= now:
                heapq.heappop(self.due)[2](now)
            self._greet(now)
            for socket, _ in self.poller.poll(self._wait_ms()):
                ready = self.by_socket.get(socket)
                if ready is not None:
                    ready.turn(time.monotonic())
        for member in self.members.values():
            member.leave()
        self.context.term()

    def _state(self, at: float) -> dict[str, Any]:
        states = Counter(member.state for member in self.members.values() if member.kind != "malicious")
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        return {
            "event": "crowd",
            "at": at,
            "states": dict(states),
            "sessions": sum(member.channel is not None for member in self.members.values()),
            "memory_bytes": memory,
            "cpu_s": time.process_time(),
            "counts": self.counts.take().to_json(),
        }

    def _greet(self, now: float) -> None:
        """Those to whom the broker has answered ask for their session."""
        for member in [member for member in self.greeting if member.connection is not None and member.connection.up]:
            self.greeting.discard(member)
            member.greet(now)

    def _wait_ms(self) -> int:
        wait_s = LONGEST_WAIT_S if not self.due else self.due[0][0] - time.monotonic()
        return int(1000 * max(0.0, min(LONGEST_WAIT_S, wait_s)))

    def _later(self, when: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self.due, (when, next(self.tie), action))

    def _connected(self, member: Member) -> None:
        assert member.connection is not None
        socket = member.connection.socket
        self.by_socket[socket] = member
        self.greeting.add(member)
        if member.kind == "slow":
            self._read_now_and_then(member, member.life, time.monotonic())
        else:
            self.poller.register(socket, zmq.POLLIN)

    def _disconnected(self, member: Member) -> None:
        assert member.connection is not None
        socket = member.connection.socket
        self.greeting.discard(member)
        del self.by_socket[socket]
        if member.kind != "slow":
            self.poller.unregister(socket)

    def _read_now_and_then(self, member: Member, life: int, now: float) -> None:
        if member.life != life or member.connection is None:
            return
        if member.connection.socket in self.by_socket:
            member.turn(now)
        self._later(now + self.plan.slow_s, lambda later: self._read_now_and_then(member, life, later))
