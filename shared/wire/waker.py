"""Waking a socket thread from another thread: a pair of connected sockets that zmq can poll."""

import contextlib
import socket


class Waker:
    """`wake()` from any thread makes `reader` readable; `drain()` by the polling thread makes it unreadable again."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def wake(self) -> None:
        """A full pipe means that a wake-up is pending already; a closed one, that nobody waits."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._writer.send(b"!")

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.reader.recv(4096):
                pass

    def close(self) -> None:
        self.reader.close()
        self._writer.close()
