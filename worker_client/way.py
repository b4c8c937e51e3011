"""The client's way to its server: through the first of the invitation's brokers that answers, again after it broke."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from shared.errors import ConnectionFailed, HandshakeError
from shared.identity import Identity
from shared.invitations import Invitation
from shared.logs import event
from worker_client.link import Link

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0

logger = logging.getLogger(__name__)


class Way:
    """Links, one at a time. `reconnect_s`: how long to try anew, without any progress, once a link was there."""

    def __init__(
        self,
        invitation: Invitation,
        identity: Identity,
        connect_timeout_s: float,
        reconnect_s: float,
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
    ) -> None:
        self.invitation = invitation
        self.identity = identity
        self.connect_timeout_s = connect_timeout_s
        self.reconnect_s = reconnect_s
        self.context = context
        self.bytes_up = 0
        self.bytes_down = 0
        self._doors = [broker.door for broker in invitation.brokers]
        self._broken_since: float | None = None
        self._pause_s = FIRST_PAUSE_S

    @contextmanager
    def link(self) -> Iterator[Link]:
        """An open link; the broker that answered last is asked first.

        Raises what opening one raises: of ConnectionFailed, the last broker's.
        """
        link = self._open()
        try:
            yield link
        finally:
            link.__exit__(None, None, None)
            self.bytes_up += link.connection.bytes_sent
            self.bytes_down += link.connection.bytes_received

    def progress(self) -> None:
        """Something was achieved: the next break has all its time."""
        self._broken_since = None
        self._pause_s = FIRST_PAUSE_S

    def broke(self, error: ConnectionFailed, *, once_there: bool) -> None:
        """Wait a little before the next try.

        Raises `error` if there was no link yet, it is time to give up, or somebody is not who he should be.
        """
        now = time.monotonic()
        if self._broken_since is None:
            self._broken_since = now
        if isinstance(error, HandshakeError) or not once_there or now - self._broken_since > self.reconnect_s:
            raise error
        event(logger, "connection_lost", level=logging.WARNING, reason=error.message, next_try_s=self._pause_s)
        time.sleep(self._pause_s)
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)

    def _open(self) -> Link:
        for index, door in enumerate(self._doors):
            link = Link(
                door,
                self.identity,
                self.invitation.server_public,
                self.invitation.job_digest,
                connect_timeout_s=self.connect_timeout_s,
                context=self.context,
            )
            try:
                link.__enter__()
            except ConnectionFailed as error:
                if index == len(self._doors) - 1:
                    raise
                event(logger, "broker_passed_over", level=logging.WARNING, broker=door.address, reason=error.message)
                continue
            self._doors = [*self._doors[index:], *self._doors[:index]]
            return link
        raise AssertionError("an invitation names a broker at least")
