"""Several servers, each with a replica of the trunk, averaged at the ends of rounds through torch.distributed.

"Server-hierarchical" in the appendix of FL-GLM (arXiv 2406.14898), with batching inside each replica: clients are
spread over the replicas, and what FedAvg does with clients it does with replicas too, weighted by their clients'
weights. Optimizer moments stay where they are.

Collectives run on the compute thread. Beside them the replicas leave notes in the group's store: that one has its
clients, for the first round begins when all have; and that one ends a round, so that a replica whose clients are gone,
which ends no rounds of its own, joins in with weight 0 and holds nobody up.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from shared import flat
from shared.errors import ConnectionFailed, UsageError
from worker_server.settings import ServerSettings

STORE_S = 30.0
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Place:
    """Which replica this is, of how many, and where they meet. `hosts_store`: this one keeps the meeting place."""

    replica: int
    replicas: int
    host: str
    port: int
    hosts_store: bool


def place_of(settings: ServerSettings) -> Place | None:
    """From the settings, or with `rendezvous` "env" from what torchrun sets. None for a server on its own.

    Raises UsageError if settings or environment do not fit together.
    """
    if settings.rendezvous == "env":
        try:
            rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            host = os.environ["MASTER_ADDR"]
        except (KeyError, ValueError):
            raise UsageError(
                "--rendezvous env needs RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT", hint="start it with torchrun"
            ) from None
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Place(rank, world, host, port, rank == 0 and not agent)
    if settings.replicas == 1:
        return None
    parts = urlsplit(settings.rendezvous or "")
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise UsageError(
            f"{settings.replicas} replicas need --rendezvous tcp://host:port, the same for all",
            hint="host is that of replica 0; the port is free there",
        )
    if settings.replica >= settings.replicas:
        raise UsageError(f"--replica {settings.replica} of {settings.replicas}: they count from 0")
    return Place(settings.replica, settings.replicas, parts.hostname, parts.port, settings.replica == 0)


def device_of(settings: ServerSettings) -> str:
    """The device of this replica: under torchrun "cuda" is the GPU of the process's number on its machine."""
    local = os.environ.get("LOCAL_RANK", "")
    if settings.rendezvous == "env" and settings.device == "cuda" and local.isdecimal():
        return f"cuda:{local}"
    return settings.device


def interface_towards(host: str, port: int) -> str | None:
    """The network interface through which `host` is reached; None if that is this machine itself, or not known."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        mine = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == mine for address in addresses) and not ipaddress.ip_address(mine).is_loopback:
                return name
    return None


class Replicas:
    """The group, from the point of view of one replica. Waits at most `timeout_s` for the others."""

    def __init__(self, place: Place, device: str, timeout_s: float) -> None:
        """Waits until all replicas are there. Raises ConnectionFailed."""
        self.place = place
        self.device = device if device.startswith("cuda") else "cpu"
        self.timeout_s = timeout_s
        timeout = timedelta(seconds=timeout_s)
        # By itself gloo listens where this machine's name resolves to, which is loopback on many.
        if GLOO_INTERFACE not in os.environ and (interface := interface_towards(place.host, place.port)):
            os.environ[GLOO_INTERFACE] = interface
        try:
            # torchrun keeps its store when it starts the servers again: nothing said before counts.
            attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            store = TCPStore(place.host, place.port, None, place.hosts_store, timeout, wait_for_workers=False)
            dist.init_process_group(
                "nccl" if self.device != "cpu" else "gloo",
                store=PrefixStore(f"{attempt}/group", store),
                rank=place.replica,
                world_size=place.replicas,
                timeout=timeout,
            )
            # Another connection for the socket thread: the first may be blocked in a collective.
            notes = TCPStore(place.host, place.port, None, False, timedelta(seconds=STORE_S), wait_for_workers=False)
            self.notes = PrefixStore(attempt, notes)
        except (RuntimeError, ValueError) as error:
            raise self._gone("were not all there", error) from None

    def earliest(self, round: int) -> int:
        """The smallest of all replicas' `round`: from there all can go on."""
        value = torch.tensor([round], dtype=torch.int64, device=self.device)
        self._reduce(value, dist.ReduceOp.MIN)
        return int(value)

    def total(self, count: int) -> int:
        """The sum of all replicas' `count`."""
        value = torch.tensor([count], dtype=torch.int64, device=self.device)
        self._reduce(value, dist.ReduceOp.SUM)
        return int(value)

    def mean(self, values: Mapping[str, Tensor], weight: int) -> dict[str, Tensor]:
        """The mean over all replicas, weighted, of the values' own type: the same on each. Sums are float64.

        `values`: the same names and shapes everywhere, in any order: a replica that was restored has another than one
        that was not. With no weight anywhere they are returned as they are.
        """
        if not values:
            self._reduce(torch.zeros(1, dtype=torch.float64, device=self.device), dist.ReduceOp.SUM)
            return {}
        vector = flat.join(values, torch.float64, self.device)
        total = torch.cat([vector * weight, vector.new_tensor([weight])])
        self._reduce(total, dist.ReduceOp.SUM)
        if float(total[-1]) == 0.0:
            return dict(sorted(values.items()))
        means = flat.part(total[:-1] / total[-1], {name: value.shape for name, value in values.items()})
        return {name: mean.to(values[name].device, values[name].dtype) for name, mean in means.items()}

    def announce_clients(self) -> None:
        """Say that this replica has its clients."""
        self._note(lambda: self.notes.set(f"clients/{self.place.replica}", "1"))

    def all_have_clients(self) -> bool:
        """Whether every replica has said so. Does not wait."""
        keys = [f"clients/{number}" for number in range(self.place.replicas)]
        return bool(self._note(lambda: self.notes.check(keys)))

    def announce_end(self, round: int) -> None:
        """Say that this replica is about to average `round`."""
        self._note(lambda: self.notes.set(f"end/{round}", "1"))

    def ending(self, round: int) -> bool:
        """Whether some replica waits for the others to average `round`. Does not wait."""
        return bool(self._note(lambda: self.notes.check([f"end/{round}"])))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _reduce(self, value: Tensor, how: "dist.ReduceOp.RedOpType") -> None:
        try:
            dist.all_reduce(value, how)
        except RuntimeError as error:
            raise self._gone("did not come to the end of the round", error) from None

    def _note(self, action: Callable[[], object]) -> object:
        try:
            return action()
        except RuntimeError as error:
            raise self._gone("are not reached", error) from None

    def _gone(self, what: str, error: Exception) -> ConnectionFailed:
        reason = (str(error).splitlines() or [""])[0][:120]
        return ConnectionFailed(
            f"the other replicas {what} within {self.timeout_s:g} s ({reason})",
            hint="start all replicas again: they go on from the last round that all of them completed",
        )
