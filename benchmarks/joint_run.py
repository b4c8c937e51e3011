"""A joint run with all roles in this process, timed, its bytes counted by each client's link: as long as it takes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.in_process import Background, Serving, Site, serving, train_one, trunk_tensors
from shared.errors import ConnectionFailed
from shared.job import Job
from worker_client.data import Row
from worker_client.head_tail import HeadTail
from worker_client.link import Link
from worker_client.local_trunk import trunk_of
from worker_client.remote_trunk import RemoteTrunk

LOOK_S = 0.5


@dataclass(frozen=True)
class Joint:
    """`trained` by name in the whole model; body bytes of each client; `seconds` from the first round's beginning to
    the end of the last client's last round: loading models is not in it."""

    trained: dict[str, Tensor]
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    seconds: float
    events: dict[str, list[dict[str, Any]]]


@dataclass
class Clock:
    began: float | None = None
    ended: float = 0.0

    def heard(self, event: Mapping[str, Any]) -> None:
        if event["event"] in ("round", "finished"):
            self.ended = time.monotonic()
            self.began = self.began or self.ended

    @property
    def seconds(self) -> float:
        return self.ended - (self.began or self.ended)


@dataclass
class Trunks:
    """Makes the clients' trunks, and keeps their links for what they counted. A kind of trunk overrides `make`."""

    links: dict[str, Link] = field(default_factory=dict)

    def make(self, client: str, link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
        return trunk_of(link, job, parts, timeout_s)

    def site(self, client: str, rows: Sequence[Row], validation: Sequence[Row]) -> Site:
        def made(link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
            self.links[client] = link
            return self.make(client, link, job, parts, max(timeout_s, job.cohort.deadline_s))

        return Site(rows, validation, made)


def train(
    job: Job,
    rows: Mapping[str, Sequence[Row]],
    folder: Path,
    *,
    validation: Sequence[Row] = (),
    trunks: Trunks | None = None,
    **server_settings: Any,
) -> Joint:
    """Run the job to its end, one client for each of `rows`. Raises what any role raised."""
    trunks = trunks or Trunks()
    clock = Clock()
    outcomes = {}

    def run(running: Serving, client: str) -> None:
        site = trunks.site(client, rows[client], validation)
        outcomes[client] = train_one(running, client, site, folder, clock.heard)

    with serving(job, folder, sorted(rows), **server_settings) as running:
        threads = [Background(client, lambda client=client: run(running, client)) for client in rows]
        wait_for([*threads, running.service])
    parts = next(iter(outcomes.values())).parts
    return Joint(
        trunk_tensors(folder) | {name: p.detach() for name, p in parts.parameters.items()},
        {client: link.connection.bytes_sent for client, link in trunks.links.items()},
        {client: link.connection.bytes_received for client, link in trunks.links.items()},
        clock.seconds,
        {client: outcome.events for client, outcome in outcomes.items()},
    )


def wait_for(threads: Sequence[Background]) -> None:
    """Until all have ended, or one with an error, which is raised, or that by which it lost the others."""
    waiting = list(threads)
    while waiting:
        for thread in list(waiting):
            thread.thread.join(LOOK_S / len(waiting))
            if not thread.thread.is_alive():
                waiting.remove(thread)
        errors = [thread.error for thread in threads if thread.error is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, ConnectionFailed)), errors[0])
