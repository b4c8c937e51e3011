"""The same roles as threads of one process, on inproc addresses: real broker, sealing and models, no processes.

For benchmarks and tests that run many small jobs.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from torch import Tensor

from broker.routing import Router
from broker.service import Broker
from broker.settings import BrokerSettings
from shared import state_files
from shared.errors import DeadlineExceeded
from shared.identity import Identity, create_identity, load_identity
from shared.job import Job
from shared.model.checkpoint import checkpoint_of
from shared.prefixes import under
from shared.secure_aggregation.group_key import GroupKey
from shared.wire.curve import Door
from worker_client.client import group_of
from worker_client.data import Row
from worker_client.head_tail import HeadTail, load_client_parts
from worker_client.link import Link
from worker_client.local_trunk import trunk_of
from worker_client.privacy.ledger import SUFFIX, Ledger
from worker_client.privacy.protection import Protection
from worker_client.remote_trunk import RemoteTrunk
from worker_client.steps import Report
from worker_client.training import Training
from worker_server.server import Server
from worker_server.settings import ServerSettings

CLIENTS = "inproc://clients"
SERVERS = "inproc://servers"
IN_PROCESS = BrokerSettings(frontend=CLIENTS, backend=SERVERS)
READY_S = 60.0
JOIN_S = 600.0


@dataclass(frozen=True)
class Site:
    """A client's rows. `trunk`: what makes its remote trunk, for a client that does not do as it should.

    `max_epsilon`: what a private job may cost it, at the job's delta. `group_key`: that of a job which has one.
    """

    train: Sequence[Row]
    validation: Sequence[Row] = ()
    trunk: Callable[[Link, Job, HeadTail, float], RemoteTrunk] = trunk_of
    max_epsilon: float | None = None
    group_key: GroupKey | None = None


@dataclass(frozen=True)
class Outcome:
    """One client's events and its head and tail after the job."""

    events: list[dict[str, Any]]
    parts: HeadTail


class Background:
    """A thread whose error is raised by `join()`."""

    def __init__(self, name: str, target: Any) -> None:
        self.error: BaseException | None = None
        self.target = target
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def join(self) -> None:
        self.thread.join(JOIN_S)
        if self.error is not None:
            raise self.error
        if self.thread.is_alive():
            raise DeadlineExceeded(f"{self.thread.name} did not end within {JOIN_S:g} s")

    def _run(self) -> None:
        try:
            self.target()
        except BaseException as error:  # noqa: BLE001 - raised by join()
            self.error = error


@dataclass(frozen=True)
class Serving:
    """A running broker and server, and the clients that they admit."""

    context: "zmq.Context[zmq.Socket[bytes]]"
    job: Job
    server: Identity
    clients: dict[str, Identity]
    service: Background
    running: Server
    broker: Broker

    def link(self, name: str) -> Link:
        """A link for the admitted client `name`, not yet entered."""
        door = Door(self.broker.frontend)
        return Link(door, self.clients[name], self.server.public, self.job.digest(), context=self.context)


@contextmanager
def serving(
    job: Job,
    folder: Path,
    names: Sequence[str],
    router: Router | None = None,
    broker_settings: BrokerSettings = IN_PROCESS,
    **server_settings: Any,
) -> Iterator[Serving]:
    """Broker and server for `job`, keys and checkpoints under `folder`. An error of theirs is raised at the end.

    `router`: the broker's logic, for those who want it to do more, or worse, than route.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    identities = {name: _identity(folder / "keys", name) for name in names}
    admitted: Mapping[bytes, str] = {identity.public: name for name, identity in identities.items()}
    with Broker(broker_settings, context) as broker:
        broker.router = router or broker.router
        routing = Background("broker", broker.run)
        identity = _identity(folder / "keys", "server")
        settings = ServerSettings(brokers=(Door(broker.backend),), state=folder / "server-state", **server_settings)
        server = Server(settings, job, identity, lambda: admitted, context)
        service = Background("server", server.run)
        try:
            yield Serving(context, job, identity, identities, service, server, broker)
        finally:
            server.stop()
            try:
                service.join()
            finally:
                broker.stop()
                routing.join()
    context.term()


def _identity(keys: Path, name: str) -> Identity:
    """That of an earlier run in the same folder, or a new one."""
    path = keys / f"{name}.key"
    return load_identity(path) if path.exists() else create_identity(keys, name)


def train_one(running: Serving, name: str, site: Site, folder: Path, report: Report | None = None) -> Outcome:
    """The admitted client `name` to the end of the job; `report` hears its events as they come."""
    events: list[dict[str, Any]] = []

    def heard(event: dict[str, Any]) -> None:
        events.append(event)
        if report is not None:
            report(event)

    checkpoint = checkpoint_of(running.job)
    parts = load_client_parts(checkpoint, running.job)
    group = group_of(running.job, checkpoint, site.group_key)
    protection = None
    if running.job.privacy.type != "none":
        rows = hashlib.sha256(repr(site.train).encode()).hexdigest()
        ledger = Ledger(folder / f"{name}{SUFFIX}", rows, site.max_epsilon, running.job.privacy.delta)
        protection = Protection(running.job, ledger, heard)
    with running.link(name) as link:
        trunk = site.trunk(link, running.job, parts, JOIN_S)
        out = folder / name
        Training(
            running.job, parts, trunk, site.train, site.validation, out, heard, protection=protection, group=group
        ).run()
    return Outcome(events, parts)


def train_in_process(
    job: Job, sites: Mapping[str, Site], folder: Path, router: Router | None = None, **server_settings: Any
) -> dict[str, Outcome]:
    """Run the job to its end with these clients. Raises what any of them raised."""
    outcomes: dict[str, Outcome] = {}

    def run(running: Serving, name: str, site: Site) -> None:
        outcomes[name] = train_one(running, name, site, folder)

    with serving(job, folder, sorted(sites), router, **server_settings) as running:
        threads = [Background(name, lambda n=name, s=site: run(running, n, s)) for name, site in sites.items()]
        for thread in threads:
            thread.join()
        running.service.join()
    return outcomes


def trunk_tensors(folder: Path) -> dict[str, Tensor]:
    """What the server of a run under `folder` trained, by name in the whole model, from its last checkpoint."""
    state = folder / "server-state"
    tensors, _ = state_files.load(state, state_files.numbers(state)[-1])
    return under("trunk/", tensors)
