"""Mutated messages against a running broker and server: nothing breaks, nothing grows, and others train undisturbed.

Broker and server are threads of this process, with real sockets and sealing. An admitted but hostile client sends, in
turn: frames that are no message; messages whose frames were cut, flipped, repeated, swapped or made long; records that
do not open; and records that open, with something in them that is no message of ours. While that goes on, an honest
client then trains: its model must be that of a run without the attacker, bit by bit. Counted: what was sent, and every
refusal by its code.
"""

import contextlib
import logging
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import zmq

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import (
    IN_PROCESS,
    Background,
    Serving,
    Site,
    serving,
    train_in_process,
    train_one,
    trunk_tensors,
)
from loadtest.malice import Malice
from shared import PROTOCOL_VERSION
from shared.identity import key_digest
from shared.job import Job, Rounds
from shared.payload.messages import Confirm
from shared.payload.messages import pack as pack_message
from shared.secure.handshake import ClientHandshake
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Accept, Close, Data, Envelope, Open, pack

BATCH = 100
WAIT_S = 30.0


class Attacker:
    """An admitted client that has read the protocol."""

    def __init__(self, running: Serving, seed: int) -> None:
        self.running = running
        self.chance = random.Random(seed)
        self.connection = BrokerConnection(running.context, Door(running.broker.frontend), hello("client"))
        self.connection.open(WAIT_S)
        self.heard: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.session = b""
        self.malice = self._open()

    def _open(self) -> Malice:
        identity = self.running.clients["hostile"]
        server = self.running.server.public
        self.session = self.chance.randbytes(16)
        header = Open(
            version=PROTOCOL_VERSION, session=self.session, server=key_digest(server), job=self.running.job.digest()
        )
        handshake = ClientHandshake(identity.private, server, header)
        greeting = pack(header, [handshake.message_1])
        self._say(greeting)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            self.connection.socket.poll(100)
            for envelope in self.connection.received(time.monotonic()):
                if isinstance(envelope.header, Accept) and envelope.header.session == self.session:
                    channel, _ = handshake.finish(bytes(envelope.body[0]))
                    self._say(channel.seal(pack_message(Confirm())))
                    return Malice(self.chance, self.session, channel)
                if isinstance(envelope.header, Close):
                    self.heard[envelope.header.code] += 1
                if isinstance(envelope.header, Close) and envelope.header.code in ("no_such_server", "unknown_peer"):
                    time.sleep(0.1)
                    self._say(pack(hello("client")))
                    self._say(greeting)
        raise TimeoutError(f"the server does not answer an honest greeting; heard {dict(self.heard)}")

    def batch(self) -> None:
        kind = self.chance.choice(list(self.malice.kinds))
        for _ in range(BATCH):
            try:
                self.connection.socket.send_multipart(self.malice.kinds[kind](), zmq.DONTWAIT)
            except zmq.Again:
                break
            self.sent[kind] += 1
        self._listen()

    def _say(self, envelope: Envelope) -> None:
        if not self.connection.socket.poll(int(WAIT_S * 1000), zmq.POLLOUT):
            raise TimeoutError("the broker takes no more messages")
        self.connection.socket.send_multipart(envelope.frames())

    def _listen(self) -> None:
        """What was refused; a session or connection that was lost is opened again, as an attacker would."""
        lost = unknown = False
        for envelope in self.connection.received(time.monotonic()):
            if isinstance(envelope.header, Close):
                self.heard[envelope.header.code] += 1
                unknown |= envelope.header.code == "unknown_peer"
                lost |= envelope.header.session == self.session
            elif isinstance(envelope.header, Data):
                self.heard["answers"] += 1
        if unknown:
            self._say(pack(hello("client")))
        if lost or unknown:
            self.malice = self._open()


def resident_mb() -> float:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def attack(job: Job, folder: Path, messages: int, seed: int) -> tuple[Attacker, Counter[str], float]:
    """The attacker, refusals by code at broker and server, and by how many MB memory grew after the first fifth."""
    # What the broker would hold back is to reach the server.
    unbounded = IN_PROCESS.model_copy(update={"max_unanswered": 2**31})
    with serving(job, folder, ["honest", "hostile"], broker_settings=unbounded) as running:
        attacker, warm_until = Attacker(running, seed), messages // 5
        warm = resident_mb()
        while sum(attacker.sent.values()) < messages:
            attacker.batch()
            if warm_until and sum(attacker.sent.values()) > warm_until:
                warm, warm_until = resident_mb(), 0
        grown = resident_mb() - warm
        honest = Background("honest", lambda: train_one(running, "honest", Site(random_rows(8, 0)), folder))
        while honest.thread.is_alive():  # the job ends with it, and the server with the job
            with contextlib.suppress(TimeoutError):
                attacker.batch()
        honest.join()
        running.service.join()
        assert running.running.service is not None
        refused = running.broker.router.counters + running.running.service.counters
        attacker.connection.__exit__(None, None, None)
    return attacker, refused, grown


def main() -> None:
    arguments = parser("fuzz", __doc__)
    arguments.add_argument("--messages", type=int, default=1_000_000)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    messages = 20_000 if given.quick else given.messages
    logging.disable(logging.WARNING)  # a line for each refusal would be most of the work
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(save_tiny_model("llama", folder / "model"), Case(ALL, 1))
        job = job.model_copy(update={"rounds": Rounds(count=3, local_steps=10)})
        train_in_process(job, {"honest": Site(random_rows(8, 0))}, folder / "calm")
        began = time.monotonic()
        attacker, refused, grown = attack(job, folder / "attacked", messages, given.seed)
        seconds = time.monotonic() - began
        calm, attacked = trunk_tensors(folder / "calm"), trunk_tensors(folder / "attacked")
        difference = max(float((calm[key] - attacked[key]).abs().max()) for key in calm)
    by_code = {code: count for code, count in sorted(refused.items()) if code.startswith("refused_")}
    sent = sum(attacker.sent.values())
    figures = {
        "messages": sent,
        "sent": dict(attacker.sent),
        "refused": by_code,
        "honest_model_difference": difference,
        "memory_grew_mb": grown,
        "seconds": seconds,
    }
    rows = [[kind, f"{count:,}"] for kind, count in attacker.sent.items()]
    rows += [[code, f"{count:,}"] for code, count in by_code.items()]
    goals = [
        Goal("messages", sent, messages, at_most=False),
        Goal("honest_model_difference", difference, 0, at_most=True),
        Goal("memory_grew_mb", grown, 64, at_most=True),
    ]
    publish("fuzz", ["sent, and refused by code", "messages"], rows, figures, goals, as_json=given.json)


if __name__ == "__main__":
    sys.setswitchinterval(0.001)
    main()
