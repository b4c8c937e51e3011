"""One job with all its roles as processes on this machine: the commands that an operator and data owners would type."""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from launcher.cluster import Cluster, Role
from shared.allow_list import admit
from shared.errors import DeadlineExceeded, JobError
from shared.identity import create_identity, load_card
from shared.invitations import BrokerAt, Invitation, new_id, write_invitation
from shared.job import Job, load_job

READY_S = 120.0
# A run whose clients say nothing for this long has hung.
SILENCE_S = 900.0
VALIDATION_FRACTION = 0.1
EVENTS = "events.jsonl"
# Many processes on few cores. Threads may spin between two products: waking them each time costs a third of the speed.
THREADS = {"OMP_NUM_THREADS": "1"}

Watch = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Site:
    """One data owner: name, rows to train on, rows to measure on (else a share of the former is held out)."""

    name: str
    train: Path
    validation: Path | None = None


@dataclass(frozen=True)
class ProcessInfo:
    role: str
    name: str
    pid: int
    exit_code: int | None
    peak_memory_bytes: int


@dataclass(frozen=True)
class LocalRun:
    """What the processes reported: body bytes and seconds of this start, and events by client.

    The events of earlier starts of an interrupted run are among them.
    """

    events: dict[str, list[dict[str, Any]]]
    bytes_up: int
    bytes_down: int
    seconds: float
    processes: list[ProcessInfo]


def train_together(
    job: Job,
    sites: list[Site],
    out: Path,
    watch: Watch | None = None,
    *,
    server_threads: int = 1,
    replicas: int = 1,
    through: Callable[[str], str] | None = None,
) -> LocalRun:
    """Run broker, server and one client a site to the job's end, all files under `out`; there again, it resumes.

    Clients compute with one thread each, servers with `server_threads`; `replicas` of them share the clients. `watch`
    gets each client's events as they come. `through`: given the broker's
    address, where clients connect instead (a proxy). Raises JobError if `out` holds another job's run, RoleFailed with
    the words of a process that failed, DeadlineExceeded if nothing moves.
    """
    prepare(job, sites, out)
    began = time.monotonic()
    with Cluster(out / "logs", THREADS) as cluster:
        addresses = start_broker(cluster, out)
        start_servers(cluster, out, addresses["servers"], server_threads, replicas)
        reached = addresses["clients"] if through is None else through(addresses["clients"])
        clients = [start_client(cluster, out, job, site, reached) for site in sites]
        with (out / EVENTS).open("a") as kept:

            def seen(name: str, event: dict[str, Any]) -> None:
                print(json.dumps({"client": name, **event}), file=kept)
                if watch is not None:
                    watch(name, event)

            _watch_until_done(cluster, clients, seen, out)
        seconds = time.monotonic() - began
    results = {role.name: _result(role) for role in cluster.roles}
    return LocalRun(
        _kept_events(out, sites),
        sum(results[role.name]["bytes_up"] for role in clients),
        sum(results[role.name]["bytes_down"] for role in clients),
        seconds,
        [_describe(role, results[role.name]) for role in cluster.roles],
    )


def _kept_events(out: Path, sites: list[Site]) -> dict[str, list[dict[str, Any]]]:
    events: dict[str, list[dict[str, Any]]] = {site.name: [] for site in sites}
    for line in (out / EVENTS).read_text().splitlines():
        event = json.loads(line)
        events[event["client"]].append(event)
    return events


def _describe(role: Role, result: dict[str, Any]) -> ProcessInfo:
    return ProcessInfo(role.role, role.name, role.process.pid, role.exit_code, result["peak_memory_bytes"])


def prepare(job: Job, sites: list[Site], out: Path) -> None:
    """Job file, keys and admissions under `out`, unless they are there. Raises JobError."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "job.yaml"
    if path.exists() and load_job(path) != job:
        raise JobError(f"{out} holds an unfinished run with other settings", hint=f"remove {out}, or name another")
    path.write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))
    keys = out / "keys"
    for name in ("broker", "server", *(site.name for site in sites)):
        if not (keys / f"{name}.card").exists():
            create_identity(keys, name)
    now = datetime.now(UTC)
    for site in sites:
        admit(keys / f"{site.name}.card", out / "clients", now)
    admit(keys / "server.card", out / "servers", now)


def start_broker(cluster: Cluster, out: Path) -> dict[str, Any]:
    """A broker on free ports; its `clients` and `servers` addresses."""
    anywhere = "tcp://127.0.0.1:*"
    broker = cluster.start("broker", "broker", broker_words(out, anywhere, anywhere))
    return cluster.wait_for(broker, "ready", READY_S)


def start_servers(cluster: Cluster, out: Path, broker: str, threads: int, replicas: int = 1) -> list[Role]:
    """The server, or its replicas, which meet at a free port."""
    words = server_words(out, broker, threads)
    if replicas == 1:
        return [cluster.start("server", "server", words)]
    words += ["--replicas", str(replicas), "--rendezvous", f"tcp://127.0.0.1:{free_port()}"]
    return [
        cluster.start("server", f"server-{number}", [*words, "--replica", str(number)]) for number in range(replicas)
    ]


def start_client(cluster: Cluster, out: Path, job: Job, site: Site, broker: str) -> Role:
    return cluster.start("client", site.name, client_words(out, job, site, broker))


def broker_words(out: Path, clients: str, servers: str) -> list[str]:
    """The command of a broker with these addresses."""
    return [
        "broker", "--clients-address", clients, "--servers-address", servers,
        "--key", str(out / "keys" / "broker.key"), "--clients", str(out / "clients"), "--servers", str(out / "servers"),
    ]  # fmt: skip


def server_words(out: Path, broker: str, threads: int) -> list[str]:
    """The command of a server of `prepare`'s job."""
    return [
        "server", "--job", str(out / "job.yaml"), "--key", str(out / "keys" / "server.key"),
        "--clients", str(out / "clients"), "--broker", broker, "--state", str(out / "server-state"),
        "--threads", str(threads), "--broker-card", str(out / "keys" / "broker.card"),
    ]  # fmt: skip


def client_words(out: Path, job: Job, site: Site, broker: str) -> list[str]:
    """The command of a client of that job, whose invitation is written."""
    words = [
        "client", "train", "--invite", str(_invite(out, job, site, broker)),
        "--key", str(out / "keys" / f"{site.name}.key"), "--data", str(site.train),
        "--out", str(out / "results" / site.name), "--threads", "1",
        "--validation-fraction", str(VALIDATION_FRACTION), "--connect-timeout", str(READY_S),
    ]  # fmt: skip
    return words if site.validation is None else [*words, "--validation", str(site.validation)]


def free_port() -> int:
    """A TCP port of this machine that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def _invite(out: Path, job: Job, site: Site, broker: str) -> Path:
    """The site is admitted already: nobody has to answer it."""
    card = load_card(out / "keys" / "server.card")
    path = out / "keys" / f"{site.name}.invite"
    path.unlink(missing_ok=True)
    key = load_card(out / "keys" / "broker.card").link_key
    invitation = Invitation(
        id=new_id(),
        client=site.name,
        brokers=[BrokerAt(address=broker, key=key)],
        server=card.name,
        server_public_key=card.public_key,
        job=job.digest().hex(),
        expires_at=datetime.now(UTC) + timedelta(days=1),
    )
    write_invitation(path, invitation, None)
    return path


def _watch_until_done(cluster: Cluster, clients: list[Role], watch: Watch, out: Path) -> None:
    heard = time.monotonic()
    names = {role.name for role in clients}
    ended = False
    while not ended:
        ended = all(role.exit_code is not None for role in clients)
        for role, event in cluster.events(0.5 if ended else 0.2):
            heard = time.monotonic()
            if role.name in names:
                watch(role.name, event)
        cluster.check()
        if time.monotonic() - heard > SILENCE_S:
            raise DeadlineExceeded(f"no progress for {SILENCE_S:g} s", hint=f"see {out / 'logs'}")


def _result(role: Role) -> dict[str, Any]:
    for event in reversed(role.events):
        if event.get("status") == "ok":
            data: dict[str, Any] = event["data"]
            return data
    raise DeadlineExceeded(f"{role.name} ended without a result", hint=f"see {role.log}")
