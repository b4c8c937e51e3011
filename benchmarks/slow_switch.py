"""A switch that delays frames and loses some: what netem on every cable of a bridge does, for kernels without it.

    python -m benchmarks.slow_switch DELAY_MS JITTER_MS LOSS INTERFACE...

It passes Ethernet frames between the interfaces of its network namespace until standard input ends.
"""

import contextlib
import heapq
import random
import select
import socket
import sys
import time
from typing import Any

ETH_P_ALL = 3
# From linux/if_packet.h. With the header, frames larger than a cable's and unfinished checksums go as they come.
SOL_PACKET, PACKET_VNET_HDR, VNET_HDR_BYTES = 263, 15, 10
LONGEST = 2**17
BUFFER = 2**22


def listen(interface: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    made.bind((interface, 0))
    made.setblocking(False)
    return made


class Switch:
    """`take` what came, `deliver` what is due. A frame to whom nobody has heard of goes to all."""

    def __init__(self, ports: list[socket.socket], delay_s: float, jitter_s: float, loss: float) -> None:
        self.ports = ports
        self.delay_s = delay_s
        self.jitter_s = jitter_s
        self.loss = loss
        self.chance = random.Random(0)
        self.homes: dict[bytes, socket.socket] = {}
        self.on_the_way: list[tuple[float, int, bytes, socket.socket]] = []
        self.taken = 0

    def take(self, port: socket.socket, now: float) -> None:
        """One frame, unless it is this switch's own. A cable that is cut loses what is on it."""
        with contextlib.suppress(OSError):
            frame, (_, _, kind, _, _) = port.recvfrom(LONGEST)
            if kind == socket.PACKET_OUTGOING:
                return
            self.taken += 1
            start = VNET_HDR_BYTES
            self.homes[frame[start + 6 : start + 12]] = port
            if self.chance.random() >= self.loss:
                due = now + max(0.0, self.delay_s + self.chance.uniform(-self.jitter_s, self.jitter_s))
                heapq.heappush(self.on_the_way, (due, self.taken, frame, port))

    def deliver(self, now: float) -> None:
        while self.on_the_way and self.on_the_way[0][0] <= now:
            _, _, frame, source = heapq.heappop(self.on_the_way)
            home = self.homes.get(frame[VNET_HDR_BYTES : VNET_HDR_BYTES + 6])
            for port in self.ports if home is None else [home]:
                if port is not source:
                    with contextlib.suppress(OSError):
                        port.send(frame)

    def wait_s(self, now: float) -> float | None:
        return max(0.0, self.on_the_way[0][0] - now) if self.on_the_way else None


def main() -> None:
    delay_ms, jitter_ms, loss = (float(word) for word in sys.argv[1:4])
    switch = Switch([listen(name) for name in sys.argv[4:]], delay_ms / 1000, jitter_ms / 1000, loss)
    print("ready", flush=True)
    while True:
        sources: list[Any] = [sys.stdin, *switch.ports]
        ready, _, _ = select.select(sources, [], [], switch.wait_s(time.monotonic()))
        if sys.stdin in ready:
            return
        for port in ready:
            switch.take(port, time.monotonic())
        switch.deliver(time.monotonic())


if __name__ == "__main__":
    main()
