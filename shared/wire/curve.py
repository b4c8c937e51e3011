"""Links between a worker and its broker, encrypted and authenticated both ways by ZeroMQ's CURVE (ZMTP 3.1, RFC 26).

A worker knows its broker's public key beforehand, a broker admits the public keys on its lists. Plain links are for one
machine alone: loopback, ipc and inproc.
"""

import ipaddress
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

import zmq
from zmq.utils import z85

from shared.errors import UsageError


@dataclass(frozen=True)
class LinkKeys:
    """A Curve25519 key pair, 32 bytes each."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def from_secret(cls, secret: bytes) -> Self:
        return cls(z85.decode(zmq.curve_public(z85.encode(secret))), secret)


@dataclass(frozen=True)
class Door:
    """Where a broker listens, and the public key (32 bytes) of its links; None: plain, on this machine alone."""

    address: str
    key: bytes | None = None


def is_local(address: str) -> bool:
    """Whether what goes through a ZeroMQ address stays on this machine."""
    parts = urlsplit(address)
    if parts.scheme in ("ipc", "inproc"):
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


def check_plain(address: str) -> None:
    """Raises UsageError if a link without encryption to or at `address` would leave this machine."""
    if "://" in address and not is_local(address):
        raise UsageError(
            f"a plain link at {address} would leave this machine in the clear",
            hint="plain links are for loopback and ipc addresses; give keys elsewhere",
        )


def use_as_worker(socket: "zmq.Socket[bytes]", keys: LinkKeys | None, door: Door) -> None:
    """Before connecting: to nobody but the broker behind `door`. Raises UsageError if that would not be safe."""
    if door.key is None:
        check_plain(door.address)
        return
    if keys is None:
        raise UsageError(f"the broker at {door.address} has a key, and this worker none to show it")
    socket.curve_publickey, socket.curve_secretkey = z85.encode(keys.public), z85.encode(keys.secret)
    socket.curve_serverkey = z85.encode(door.key)


def use_as_broker(socket: "zmq.Socket[bytes]", keys: LinkKeys, domain: str) -> None:
    """Before binding: whoever connects is shown to the context's authenticator (ZAP, RFC 27) under `domain`."""
    socket.curve_secretkey, socket.curve_publickey = z85.encode(keys.secret), z85.encode(keys.public)
    socket.curve_server = True
    socket.zap_domain = domain.encode()
