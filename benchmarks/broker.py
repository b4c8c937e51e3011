"""What the broker costs: messages a second and GB/s through it against `zmq.proxy`, and what CURVE costs both.

Three processes: one that sends sealed-size messages with at most 16 unanswered, one that answers each with a few bytes,
and between them the broker with all its rules, or libzmq's own proxy (ROUTER and DEALER, in C++), which has none. The
same frames go through either. Runs take turns; ratios are medians over one run of this command.
"""

import multiprocessing as mp
import statistics
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zmq

from benchmarks.reporting import Goal, parser, publish
from broker.guard import Guard
from broker.service import Broker
from broker.settings import BrokerSettings
from shared.allow_list import admit
from shared.heap import keep_freed_memory
from shared.identity import create_identity, key_digest, load_identity
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door, use_as_broker, use_as_worker
from shared.wire.envelope import Data, Open, pack

SIZES = {"64 KB": 2**16, "1 MB": 2**20}
WINDOW = 16
SESSION = b"s" * 16
WAIT_S = 60.0


def between(kind: str, curve: bool, keys: Path, addresses: Any) -> None:
    """The broker, or zmq.proxy, until it is terminated."""
    anywhere = "tcp://127.0.0.1:*"
    identity = load_identity(keys / "keys" / "broker.key")
    if kind == "broker":
        keep_freed_memory()  # as its command does
        guard = Guard(identity.link, keys / "clients", keys / "servers") if curve else None
        settings = BrokerSettings(frontend=anywhere, backend=anywhere, max_bytes_per_s=2.0**40)
        with Broker(settings, guard=guard) as broker:
            addresses.put((broker.frontend, broker.backend))
            broker.run()
        return
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    if curve:  # without asking who it is: libzmq admits any key where nobody answers
        Guard(identity.link, keys / "clients", keys / "servers").authenticator(context)
    ends = []
    for kind_of, side in ((zmq.ROUTER, "client"), (zmq.DEALER, "server")):
        socket = context.socket(kind_of)
        if curve:
            use_as_broker(socket, identity.link, side)
        socket.bind(anywhere)
        ends.append(socket)
    addresses.put(tuple(socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in ends))
    zmq.proxy(*ends)


def answering(kind: str, door: Door, keys: Path) -> None:
    """A server that answers every message, until it is terminated."""
    identity = load_identity(keys / "keys" / "server.key")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    answer = pack(Data(session=SESSION, sequence=0), [b"ok"])
    if kind == "broker":
        connection = BrokerConnection(context, door, hello("server", key_digest(identity.public)), identity.link)
        connection.open(WAIT_S)
        while True:  # every answer is a sign of life
            if len(connection.socket.recv_multipart(copy=False)[-1]) > 1:
                connection.socket.send_multipart(answer.frames(), copy=False)
    socket = context.socket(zmq.DEALER)
    use_as_worker(socket, identity.link, door)
    socket.connect(door.address)
    while True:
        sender, *_ = socket.recv_multipart(copy=False)
        socket.send_multipart([sender, *answer.frames()], copy=False)


def rate(kind: str, door: Door, keys: Path, size: int, seconds: float) -> float:
    """Messages a second that came through and were answered."""
    identity = load_identity(keys / "keys" / "client.key")
    server = load_identity(keys / "keys" / "server.key")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    connection = BrokerConnection(context, door, hello("client"), identity.link)
    if kind == "broker":
        connection.open(WAIT_S)
        opening = Open(version=1, session=SESSION, server=key_digest(server.public), job=b"j" * 32)
        deadline = time.monotonic() + WAIT_S
        connection.send(pack(opening, [b"1"]))
        while connection.socket.poll(200) and time.monotonic() < deadline:  # no_such_server: not there yet
            list(connection.received(time.monotonic()))
            connection.send(pack(opening, [b"1"]))
    else:
        use_as_worker(connection.socket, identity.link, door)
        connection.socket.connect(door.address)
    body = bytes(size)
    message = pack(Data(session=SESSION, sequence=0), [body])
    answered = sent = 0
    began, counted_from = time.monotonic(), 0.0
    with connection:
        while True:
            while sent - answered < WINDOW:
                connection.socket.send_multipart(message.frames(), copy=False)
                sent += 1
            connection.socket.recv_multipart(copy=False)
            answered += 1
            now = time.monotonic()
            if counted_from == 0.0 and now - began > seconds / 4:  # warm
                counted_from, first = now, answered
            if now - began > seconds:
                return (answered - first) / (now - counted_from)


def measure(kind: str, curve: bool, size: int, keys: Path, seconds: float) -> float:
    context = mp.get_context("spawn")
    addresses: Any = context.Queue()
    processes = [context.Process(target=between, args=(kind, curve, keys, addresses), daemon=True)]
    processes[0].start()
    front, back = addresses.get(timeout=WAIT_S)
    key = load_identity(keys / "keys" / "broker.key").link.public if curve else None
    processes.append(context.Process(target=answering, args=(kind, Door(back, key), keys), daemon=True))
    processes[1].start()
    try:
        return rate(kind, Door(front, key), keys, size, seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def make_keys(folder: Path) -> None:
    for name, admitted in (("broker", None), ("server", "servers"), ("client", "clients")):
        create_identity(folder / "keys", name)
        if admitted:
            admit(folder / "keys" / f"{name}.card", folder / admitted, datetime.now(UTC))


def main() -> None:
    given = parser("broker", __doc__).parse_args()
    repetitions, seconds = (1, 1.0) if given.quick else (5, 3.0)
    rates: dict[tuple[str, bool, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        make_keys(Path(name))
        for _ in range(repetitions):
            for label, size in SIZES.items():
                for curve in (False, True):
                    for kind in ("broker", "proxy"):
                        rates[kind, curve, label].append(measure(kind, curve, size, Path(name), seconds))
    medians = {key: statistics.median(found) for key, found in rates.items()}
    rows, figures, goals = [], {}, []
    for (kind, curve, label), found in rates.items():
        middle = medians[kind, curve, label]
        rows.append(
            [
                kind,
                label,
                "CURVE" if curve else "plain",
                f"{middle:,.0f}",
                f"{min(found):,.0f} to {max(found):,.0f}",
                f"{middle * SIZES[label] / 1e9:.2f}",
                f"{middle / medians['proxy', curve, label]:.2f}",
                f"{middle / medians[kind, False, label]:.2f}",
            ]
        )
    for label in SIZES:
        short = label.replace(" ", "_").lower()
        figures[f"over_proxy_{short}"] = medians["broker", False, label] / medians["proxy", False, label]
        figures[f"curve_keeps_{short}"] = medians["broker", True, label] / medians["broker", False, label]
        goals.append(Goal(f"over_proxy_{short}", figures[f"over_proxy_{short}"], 0.8, at_most=False))
    columns = ["between", "messages", "links", "a second", "range", "GB/s", "of zmq.proxy", "of plain"]
    publish("broker", columns, rows, figures, goals, as_json=given.json)


if __name__ == "__main__":
    main()
