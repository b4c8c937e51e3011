"""Multipart messages without what pyzmq's own calls spend on each part: a broker does little else.

Parts that came as frames go on as frames, not copied; bytes are small here, and a copy is cheaper than a reference that
libzmq gives back later.
"""

from collections.abc import Sequence

import zmq

from shared.wire.envelope import Frame

DONTWAIT, SNDMORE, EVENTS, POLLIN = int(zmq.DONTWAIT), int(zmq.SNDMORE), int(zmq.EVENTS), int(zmq.POLLIN)


def waiting(socket: "zmq.Socket[bytes]") -> bool:
    """Whether a message is here. Cheaper than to try and to be refused, if mostly one comes at a time."""
    return bool(int(socket.getsockopt(EVENTS)) & POLLIN)


def receive(socket: "zmq.Socket[bytes]") -> list[zmq.Frame]:
    """The parts of the next message. Raises zmq.Again if there is none."""
    part = socket.recv(DONTWAIT, copy=False)
    parts = [part]
    while part.more:
        part = socket.recv(copy=False)
        parts.append(part)
    return parts


def send(socket: "zmq.Socket[bytes]", parts: Sequence[Frame | zmq.Frame]) -> None:
    """Send without waiting. Raises zmq.Again if the queue is full, and then nothing was sent."""
    last = len(parts) - 1
    for place, part in enumerate(parts):
        flags = DONTWAIT if place == last else DONTWAIT | SNDMORE
        socket.send(part, flags, copy=not isinstance(part, zmq.Frame))
