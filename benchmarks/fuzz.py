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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import zmq

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Serving, Site, serving, train_in_process, train_one, trunk_tensors
from shared import PROTOCOL_VERSION
from shared.identity import key_digest
from shared.job import Job, Rounds
from shared.payload.messages import Backward, Confirm, Forward, Generate, Join, Release, Update
from shared.payload.messages import pack as pack_message
from shared.payload.tensors import encode
from shared.secure.handshake import ClientHandshake
from shared.secure.records import Channel
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Accept, Close, Data, Envelope, Frame, Hello, Open, Ping, pack

BATCH = 100
WAIT_S = 30.0
BOMBS = (
    b"\x91" * 4000,
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x81" * 2000 + b"\xc0",
    b"\xdd\x7f\xff\xff\xff",
)


def mutate(chance: random.Random, frames: Sequence[Frame]) -> list[bytes]:
    """One or a few changes to a message's frames."""
    changed = [bytes(frame) for frame in frames]
    for _ in range(chance.randint(1, 3)):
        if not changed:
            return [chance.randbytes(8)]
        index = chance.randrange(len(changed))
        frame = changed[index]
        match chance.randrange(9):
            case 0:
                flipped = bytearray(frame or b"\0")
                flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
                changed[index] = bytes(flipped)
            case 1:
                changed[index] = frame[: chance.randrange(len(frame) + 1)]
            case 2:
                changed[index] = frame + chance.randbytes(chance.randrange(1, 40))
            case 3:
                changed.insert(index, frame)
            case 4:
                del changed[index]
            case 5:
                chance.shuffle(changed)
            case 6:
                changed[index] = chance.choice(BOMBS)
            case 7:
                changed[index] = chance.randbytes(chance.randrange(200))
            case _:
                changed.extend([b"x"] * chance.choice((1, 50)))
    return changed or [b""]


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
        self.channel = self._open()
        self.kinds: dict[str, Callable[[], list[Frame]]] = {
            "no message": self._garbage,
            "mutated envelope": self._envelope,
            "record that does not open": self._forged,
            "record with other contents": self._sealed,
        }

    def _open(self) -> Channel:
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
                    return channel
                if isinstance(envelope.header, Close):
                    self.heard[envelope.header.code] += 1
                if isinstance(envelope.header, Close) and envelope.header.code in ("no_such_server", "unknown_peer"):
                    time.sleep(0.1)
                    self._say(pack(hello("client")))
                    self._say(greeting)
        raise TimeoutError(f"the server does not answer an honest greeting; heard {dict(self.heard)}")

    def batch(self) -> None:
        kind = self.chance.choice(list(self.kinds))
        for _ in range(BATCH):
            try:
                self.connection.socket.send_multipart(self.kinds[kind](), zmq.DONTWAIT)
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
            self.channel = self._open()

    def _garbage(self) -> list[Frame]:
        return [self.chance.randbytes(self.chance.randrange(60)) for _ in range(self.chance.randrange(1, 6))]

    def _envelope(self) -> list[Frame]:
        chance = self.chance
        header = chance.choice(
            (
                Ping(),
                Hello(version=1, role=chance.choice(("client", "server")), identity=chance.choice((None, bytes(32)))),
                Open(version=1, session=chance.randbytes(16), server=chance.randbytes(32), job=bytes(32)),
                Accept(session=self.session),
                Data(session=chance.choice((self.session, bytes(16))), sequence=chance.randrange(2**20)),
                Close(session=bytes(16), code="over", message="x"),
            )
        )
        body: list[Frame] = [b"x"] if isinstance(header, Open | Accept | Data) else []
        return list(mutate(chance, pack(header, body).frames()))

    def _forged(self) -> list[Frame]:
        sequence = self.channel.sealer._direction.sequence + self.chance.choice((0, 0, 1, -1))
        header = Data(session=self.session, sequence=max(0, sequence))
        return pack(header, [self.chance.randbytes(self.chance.randrange(80)) for _ in range(2)]).frames()

    def _sealed(self) -> list[Frame]:
        chance = self.chance
        info, frame = encode("hidden", torch.randn(3, 32), "float32")
        request = chance.randrange(2**31)
        message = chance.choice(
            (
                Join(request=request, rows=3),
                Forward(request=request, purpose="train", lengths=(3,), target_tokens=2, tensors=(info,)),
                Backward(request=request, forward=1, tensors=(info.model_copy(update={"name": "gradient"}),)),
                Update(request=request, round=0, weight=1, tensors=(info,)),
                Generate(request=request, stream=1, lengths=(3,), tensors=(info,)),
                Release(stream=1),
            )
        )
        frames = pack_message(message, [] if isinstance(message, Join | Release) else [frame])
        return self.channel.seal(mutate(chance, frames)).frames()


def resident_mib() -> float:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def attack(job: Job, folder: Path, messages: int, seed: int) -> tuple[Attacker, Counter[str], float]:
    """The attacker, refusals by code at broker and server, and by how many MiB memory grew after the first fifth."""
    with serving(job, folder, ["honest", "hostile"]) as running:
        attacker, warm_until = Attacker(running, seed), messages // 5
        warm = resident_mib()
        while sum(attacker.sent.values()) < messages:
            attacker.batch()
            if warm_until and sum(attacker.sent.values()) > warm_until:
                warm, warm_until = resident_mib(), 0
        grown = resident_mib() - warm
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
        "memory_grew_mib": grown,
        "seconds": seconds,
    }
    rows = [[kind, f"{count:,}"] for kind, count in attacker.sent.items()]
    rows += [[code, f"{count:,}"] for code, count in by_code.items()]
    goals = [
        Goal("messages", sent, messages, at_most=False),
        Goal("honest_model_difference", difference, 0, at_most=True),
        Goal("memory_grew_mib", grown, 64, at_most=True),
    ]
    publish("fuzz", ["sent, and refused by code", "messages"], rows, figures, goals, as_json=given.json)


if __name__ == "__main__":
    sys.setswitchinterval(0.001)
    main()
