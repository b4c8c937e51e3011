"""The commands that run a role in the foreground: broker, server, client. SIGTERM and Ctrl-C end them in good order."""

import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.client_options import (
    DataOption,
    GroupKeyOption,
    InviteOption,
    LedgerOption,
    ModelOption,
    PolicyOption,
    ValidationFractionOption,
    ValidationOption,
)
from launcher.output import Format, FormatOption, emit, succeed
from launcher.peak_memory import peak_memory_bytes
from launcher.people import BrokerCardsOption, MetricsOption, PlainOption, brokers_at
from shared.allow_list import AllowList
from shared.heap import keep_freed_memory
from shared.identity import load_identity
from shared.invitations import load_invitation
from shared.job import load_job
from shared.logs import configure
from shared.monitoring import monitored

KeyOption = Annotated[Path, typer.Option("--key", help="this role's .key file")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="threads for arithmetic")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="a log line a step")]


def broker(
    clients_address: Annotated[
        str, typer.Option("--clients-address", help="where clients connect")
    ] = "tcp://127.0.0.1:5555",
    servers_address: Annotated[
        str, typer.Option("--servers-address", help="where servers connect")
    ] = "tcp://127.0.0.1:5556",
    key: Annotated[Path | None, typer.Option("--key", help="the broker's .key file")] = None,
    clients: Annotated[Path, typer.Option("--clients", help="folder with the cards of admitted clients")] = Path(
        "clients"
    ),
    servers: Annotated[Path, typer.Option("--servers", help="folder with the cards of admitted servers")] = Path(
        "servers"
    ),
    plain: PlainOption = False,
    max_peers: Annotated[
        int, typer.Option("--max-peers", min=1, help="connected workers, clients and servers together")
    ] = 4096,
    metrics_address: MetricsOption = None,
    format: FormatOption = Format.TXT,
) -> None:
    """Route sealed messages between clients and servers. It can open none of them."""
    from broker.guard import guard_of
    from broker.service import Broker
    from broker.settings import BrokerSettings

    configure("broker")
    keep_freed_memory()
    guard = guard_of(key, clients, servers, plain=plain)
    settings = BrokerSettings(frontend=clients_address, backend=servers_address, max_peers=max_peers)
    running = Broker(settings, guard=guard)
    _on_signals(running.stop)
    with running, monitored(metrics_address, running.registry, running.health) as watched_at:
        addresses = {"clients": running.frontend, "servers": running.backend, "metrics": watched_at}
        emit(format, {"event": "ready", **addresses})
        running.run()
    succeed(format, "broker stopped", {"peak_memory_bytes": peak_memory_bytes()})


def server(
    job: Annotated[Path, typer.Option("--job", help="the job file")],
    key: KeyOption,
    clients: Annotated[Path, typer.Option("--clients", help="folder with the cards of admitted clients")] = Path(
        "clients"
    ),
    broker: Annotated[
        list[str] | None, typer.Option("--broker", help="a broker's address for servers; all are served")
    ] = None,
    broker_card: BrokerCardsOption = None,
    plain: PlainOption = False,
    state: Annotated[Path, typer.Option("--state", help="folder for checkpoints; found there, the job resumes")] = Path(
        "server-state"
    ),
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: ThreadsOption = None,
    replica: Annotated[int, typer.Option("--replica", min=0, help="this server's number among several, from 0")] = 0,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="how many servers train the job together")] = 1,
    rendezvous: Annotated[
        str | None, typer.Option("--rendezvous", help="where replicas meet: tcp://host:port, or env under torchrun")
    ] = None,
    max_kept_tokens: Annotated[
        int,
        typer.Option("--max-kept-tokens", min=0, help="tokens of forwards kept for their backward; others run again"),
    ] = 2**18,
    max_cached_tokens: Annotated[
        int, typer.Option("--max-cached-tokens", min=0, help="tokens kept for generation, over all clients")
    ] = 2**18,
    max_sessions: Annotated[
        int, typer.Option("--max-sessions", min=1, help="open sessions, of all clients together")
    ] = 1024,
    keep_serving: Annotated[
        bool,
        typer.Option("--keep-serving", help="after the last round: answer evaluations and generation until stopped"),
    ] = False,
    metrics_address: MetricsOption = None,
    verbose: VerboseOption = False,
    format: FormatOption = Format.TXT,
) -> None:
    """Hold the trunk and serve one job to its end."""
    configure("server", verbose=verbose)
    keep_freed_memory()
    loaded, identity = load_job(job), load_identity(key)
    from worker_server.server import Server, leave_arithmetic_to_the_compute_thread
    from worker_server.settings import ServerSettings

    settings = ServerSettings(
        brokers=tuple(at.door for at in brokers_at(broker or ["tcp://127.0.0.1:5556"], broker_card or [], plain)),
        state=state,
        device=device,
        threads=leave_arithmetic_to_the_compute_thread(threads),
        replica=replica,
        replicas=replicas,
        rendezvous=rendezvous,
        max_kept_tokens=max_kept_tokens,
        max_cached_tokens=max_cached_tokens,
        max_sessions=max_sessions,
        keep_serving=keep_serving,
    )
    running = Server(settings, loaded, identity, AllowList(clients).names)
    _on_signals(running.stop)
    with monitored(metrics_address, running.registry, running.health):
        running.run()
    succeed(
        format,
        f"server stopped after {running.completed_rounds} of {loaded.rounds.count} rounds: {running.checkpoint}",
        {
            "rounds": running.completed_rounds,
            "finished": running.finished,
            "checkpoint": str(running.checkpoint),
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )


def up(
    plan: Annotated[Path, typer.Argument(help="a YAML file: roles, each the words of a flglm command")],
    logs: Annotated[Path, typer.Option("--logs", help="folder for the roles' logs")] = Path("logs"),
    format: FormatOption = Format.TXT,
) -> None:
    """Run several roles on this machine, and start again what dies, until servers and clients are done."""
    from launcher.cluster import Cluster
    from launcher.supervisor import Supervisor, load_plan

    loaded = load_plan(plan)
    _on_signals(_interrupt)
    with Cluster(logs) as cluster:
        supervisor = Supervisor(cluster, loaded.roles, lambda line: print(line, file=sys.stderr))
        while not supervisor.done:
            for role, event in cluster.events(0.2):
                emit(format, {"role": role.name, **event})
            supervisor.turn()
    succeed(format, f"done, {supervisor.restarts} restarts", {"restarts": supervisor.restarts})


def client_train(
    invite: InviteOption,
    key: KeyOption,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="folder for the result and for checkpoints; found there, resumes")],
    validation: ValidationOption = None,
    validation_fraction: ValidationFractionOption = 0.1,
    model: ModelOption = None,
    policy: PolicyOption = None,
    privacy_ledger: LedgerOption = None,
    group_key: GroupKeyOption = None,
    connect_timeout: Annotated[
        float, typer.Option("--connect-timeout", min=0.1, help="seconds to wait for broker and server")
    ] = 30.0,
    reconnect: Annotated[
        float, typer.Option("--reconnect", min=0, help="seconds to try to get back after the connection broke")
    ] = 600.0,
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            min=0.1,
            help="seconds to wait for the other members, for a round to begin or to end (with cohort.sampled, times "
            "the job's rounds); by default an hour, or cohort.deadline_s where that is longer, and a minute",
        ),
    ] = None,
    threads: ThreadsOption = None,
    verbose: VerboseOption = False,
    format: FormatOption = Format.TXT,
) -> None:
    """Train with the others on rows that stay here."""
    configure("client", verbose=verbose)
    keep_freed_memory()
    identity, invitation = load_identity(key), load_invitation(invite, datetime.now(UTC))
    from launcher.progress import ClientProgress
    from worker_client.client import ClientSettings, run_client
    from worker_client.policy import Policy, load_policy

    settings = ClientSettings(
        data=data,
        out=out,
        validation=validation,
        validation_fraction=validation_fraction,
        model=model,
        threads=threads,
        connect_timeout_s=connect_timeout,
        reconnect_s=reconnect,
        wait_s=wait,
        policy=Policy() if policy is None else load_policy(policy),
        privacy_ledger=privacy_ledger,
        group_key=group_key,
    )
    _on_signals(_interrupt)
    with ClientProgress(enabled=format is Format.TXT) as progress:

        def report(event: dict[str, Any]) -> None:
            emit(format, event)
            progress.show(event)

        result = run_client(settings, invitation, identity, report)
    score = None if result.score is None else {"loss": result.score.loss, "accuracy": result.score.accuracy}
    summary = {
        "score": score,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "peak_memory_bytes": peak_memory_bytes(),
        "out": str(out),
    }
    if result.privacy is not None:
        summary["privacy"] = asdict(result.privacy)
    measured = "" if result.score is None else f"  loss {result.score.loss:.4f}, accuracy {result.score.accuracy:.1%}"
    if result.privacy is not None:
        measured += f", epsilon {result.privacy.epsilon:.4g} at delta {result.privacy.delta:g}"
    succeed(format, f"trained: {out}{measured}", summary)


def _on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def _interrupt() -> None:
    raise KeyboardInterrupt
