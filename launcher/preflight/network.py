"""Addresses: whether a broker can listen there, and whether one answers there and admits a key."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import zmq

from launcher.preflight.checks import Check, fail, ok
from shared.errors import ConnectionFailed, FlglmError, HandshakeError, UsageError
from shared.monitoring import split_address
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door, LinkKeys
from shared.wire.envelope import Close

POLL_MS = 50

Context = zmq.Context[zmq.Socket[bytes]]


@contextmanager
def probing() -> Iterator[Context]:
    """A context of its own, which waits for nobody at its end."""
    context: Context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


# Listening


def check_free(addresses: dict[str, str]) -> list[Check]:
    """One row an address, by name of the row. Nothing listens meanwhile, so that no worker connects to a probe."""
    taken: dict[tuple[str, int], str] = {}
    return [_check_one_free(name, address, taken) for name, address in addresses.items()]


def _check_one_free(name: str, address: str, taken: dict[tuple[str, int], str]) -> Check:
    mend = f"stop what uses it (perhaps this broker runs already), or give another --{name.replace(' ', '-')}"
    parts = urlsplit(address)
    if parts.scheme == "ipc":
        return _check_ipc_free(name, address, mend)
    try:
        if parts.scheme != "tcp":
            raise ValueError("it must begin with tcp:// or ipc://")
        place = _own_address(parts.netloc)
    except ValueError as error:
        return fail(name, f"{address} is no address to listen on: {error}", "write tcp://HOST:PORT, tcp://*:5555")
    if place[1] and place in taken:
        return fail(name, f"{address} is given for {taken[place]} too", "give each door a port of its own")
    taken[place] = name
    return _bind(name, address, place, mend)


def check_metrics(address: str) -> Check:
    """Whether `/metrics` can be served at this address."""
    name = "metrics address"
    try:
        host, port = split_address(address)
        host = socket.gethostbyname(host)
    except UsageError as error:
        return fail(name, error.message, error.hint or "host:port")
    except OSError as error:
        return fail(name, f"{address}: {error.strerror or error}", "give an address of this machine")
    return _bind(name, address, (host, port), "stop what uses it, or give another --metrics-address")


def _bind(name: str, address: str, place: tuple[str, int], mend: str) -> Check:
    """Bound, which fails where somebody listens, and not listened to."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError as error:
            return fail(name, f"cannot listen on {address}: {error.strerror}", mend)
    return ok(name, f"{address} is free")


def _own_address(netloc: str) -> tuple[str, int]:
    """IPv4 address and port of `host:port`, `*:port`, `interface:port` or `host:*`. Raises ValueError."""
    host, _, port = netloc.rpartition(":")
    number = 0 if port == "*" else int(port)
    if not 0 <= number <= 65535:
        raise ValueError("a port is at most 65535")
    if host == "*":
        return "0.0.0.0", number
    for interface in psutil.net_if_addrs().get(host, []):
        if interface.family == socket.AF_INET:
            return interface.address, number
    try:
        return str(IPv4Address(host)), number
    except AddressValueError:
        raise ValueError(f"{host} is neither *, an interface nor an IPv4 address") from None


def _check_ipc_free(name: str, address: str, mend: str) -> Check:
    path = address.removeprefix("ipc://")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            if Path(path).parent.is_dir():
                return ok(name, f"{address} is free")
            return fail(name, f"{Path(path).parent} is no folder", f"mkdir -p {Path(path).parent}")
        except ConnectionRefusedError:
            return ok(name, f"{address} is left over, and free")
        except OSError as error:
            return fail(name, f"{address}: {error.strerror or error}", mend)
    return fail(name, f"cannot listen on {address}: Address already in use", mend)


# Reaching


def check_name(address: str) -> Check | None:
    """Whether the host of `address` has an IPv4 address; None where there is no host to ask for."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme != "tcp" or _is_ipv4(host):
        return None
    name = f"name {host}"
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)}
    except OSError as error:
        return fail(name, f"no IPv4 address: {error.strerror or error}", "check the name and this machine's DNS")
    return ok(name, ", ".join(sorted(found)[:3]))


def _is_ipv4(host: str) -> bool:
    try:
        IPv4Address(host)
    except AddressValueError:
        return False
    return True


def check_broker(context: Context, door: Door, keys: LinkKeys, *, at: str, timeout_s: float) -> Check:
    """Whether a broker answers behind the door for `at` ("clients", "servers") and admits this key."""
    name = f"broker {door.address.removeprefix('tcp://')}"
    elsewhere = "give the address of the broker's other door"
    try:
        refusal = knock(context, door, keys, timeout_s)
    except HandshakeError as error:
        side = "" if at == "clients" else " with --clients servers; and see that it is the address for servers"
        return fail(name, error.message, f"send your card to the broker's operator, who types flglm admit{side}")
    except ConnectionFailed as error:
        return fail(name, error.message, error.hint or elsewhere)
    except FlglmError as error:
        return fail(name, error.message, error.hint or elsewhere)
    answered_by = "clients" if refusal is None else "servers" if refusal.code == "wrong_side" else None
    if answered_by is None:
        assert refusal is not None
        return fail(name, f"the broker refused: {refusal.message}", _after(refusal))
    if answered_by != at:
        return fail(name, f"{door.address} is the broker's address for {answered_by}, not for {at}", elsewhere)
    return ok(name, "answers and admits this key" if door.key else "answers, plain")


def knock(context: Context, door: Door, keys: LinkKeys, timeout_s: float) -> Close | None:
    """Greet the broker as a client does, at whichever door: None if it welcomes us, or its refusal.

    A server is not announced: the broker would take it for the one that perhaps runs, and end that one's sessions. At
    the servers' door a client is refused (`wrong_side`), after its key has been admitted. Raises ConnectionFailed,
    HandshakeError if the key is not admitted, UsageError for a plain link to elsewhere.
    """
    deadline = time.monotonic() + timeout_s
    with BrokerConnection(context, door, hello("client"), keys) as connection:
        connection.start()
        while time.monotonic() < deadline:
            connection.socket.poll(POLL_MS)
            connection.check_door()
            envelope = connection.receive(time.monotonic())
            if connection.up:
                connection.close_politely()
                return None
            if envelope is not None and isinstance(envelope.header, Close):
                return envelope.header
    raise ConnectionFailed(
        f"no broker answers at {door.address} (waited {timeout_s:g} s){_listening(door)}",
        hint="start it with 'flglm broker', or check address, firewall and the broker's card",
    )


def _listening(door: Door) -> str:
    """What a bare TCP connection adds to the silence of a broker."""
    parts = urlsplit(door.address)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        return ""
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=1.0).close()
    except OSError as error:
        return f": {error.strerror or error}"
    return ": something listens there, but not the broker of that card"


def _after(refusal: Close) -> str:
    if refusal.code == "version":
        return "install the same version of flglm here and at the broker"
    if refusal.code in ("not_admitted", "revoked"):
        return "send your card to the broker's operator, who types flglm admit"
    return "ask the broker's operator"
