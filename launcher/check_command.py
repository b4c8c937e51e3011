"""`flglm check ROLE`: what is wrong, before anything is started, and what to type to mend it.

As JSON a check that failed is an error that still gives its rows: `status` "error", `error_code` "check_failed",
`message`, `hint`, and `data.checks` as in the good case. Exit code 0 if nothing failed (warnings may be there), else 4.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
from launcher.output import Format, FormatOption, emit, fail, succeed
from launcher.people import BrokerCardsOption, ClientsOption, MetricsOption, PlainOption
from launcher.preflight.checks import Check, Checklist, Status
from shared.errors import UsageError

KeyOption = Annotated[Path, typer.Option("--key", help="this role's .key file")]
TimeoutOption = Annotated[
    float, typer.Option("--connect-timeout", min=0.1, help="seconds to wait for each answer of broker and server")
]
DigestOption = Annotated[bool, typer.Option("--digest", help="read all weights, for a digest to compare")]

STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
# Where no terminal says how wide it is, lines are not broken.
PIPE_COLUMNS = 500


class ChecksFailed(UsageError):
    """At least one check of a preflight failed."""

    code = "check_failed"


def check_broker(
    clients_address: Annotated[
        str, typer.Option("--clients-address", help="where clients will connect")
    ] = "tcp://127.0.0.1:5555",
    servers_address: Annotated[
        str, typer.Option("--servers-address", help="where servers will connect")
    ] = "tcp://127.0.0.1:5556",
    key: Annotated[Path | None, typer.Option("--key", help="the broker's .key file")] = None,
    clients: ClientsOption = Path("clients"),
    servers: Annotated[Path, typer.Option("--servers", help="folder with the cards of admitted servers")] = Path(
        "servers"
    ),
    plain: PlainOption = False,
    metrics_address: MetricsOption = None,
    format: FormatOption = Format.TXT,
) -> None:
    """Before `flglm broker`: key, lists of cards, addresses."""
    from launcher.preflight.broker import BrokerPlan, check_broker_plan

    plan = BrokerPlan(clients_address, servers_address, key, clients, servers, plain, metrics_address)
    _run(format, lambda rows: check_broker_plan(plan, rows, datetime.now(UTC)))


def check_server(
    job: Annotated[Path, typer.Option("--job", help="the job file")],
    key: KeyOption,
    clients: ClientsOption = Path("clients"),
    broker: Annotated[list[str] | None, typer.Option("--broker", help="a broker's address for servers")] = None,
    broker_card: BrokerCardsOption = None,
    plain: PlainOption = False,
    state: Annotated[Path, typer.Option("--state", help="folder for checkpoints")] = Path("server-state"),
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    replica: Annotated[int, typer.Option("--replica", min=0, help="this server's number among several")] = 0,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="how many servers train the job together")] = 1,
    invite: Annotated[
        list[Path] | None, typer.Option("--invite", help="invitations to hold against the job and the key")
    ] = None,
    metrics_address: MetricsOption = None,
    connect_timeout: TimeoutOption = 5.0,
    digest: DigestOption = False,
    format: FormatOption = Format.TXT,
) -> None:
    """Before `flglm server`: key, job, clients, brokers, model, disk, memory, device. It is not announced."""
    from launcher.preflight.server import ServerPlan, check_server_plan

    plan = ServerPlan(
        job=job,
        key=key,
        clients=clients,
        brokers=broker or ["tcp://127.0.0.1:5556"],
        broker_cards=broker_card or [],
        plain=plain,
        state=state,
        device=device,
        replica=replica,
        replicas=replicas,
        invites=invite or [],
        digest=digest,
        metrics=metrics_address,
        timeout_s=connect_timeout,
    )
    _run(format, lambda rows: check_server_plan(plan, rows, datetime.now(UTC)))


def check_client(
    invite: InviteOption,
    key: KeyOption,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="folder for the result and for checkpoints")],
    validation: ValidationOption = None,
    validation_fraction: ValidationFractionOption = 0.1,
    model: ModelOption = None,
    policy: PolicyOption = None,
    privacy_ledger: LedgerOption = None,
    group_key: GroupKeyOption = None,
    job: Annotated[
        Path | None, typer.Option("--job", help="a copy of the job file, for when the server is not there yet")
    ] = None,
    connect_timeout: TimeoutOption = 5.0,
    digest: DigestOption = False,
    format: FormatOption = Format.TXT,
) -> None:
    """Before `flglm client train`: key, invitation, broker, server, job, policy, model, rows, disk, memory."""
    from launcher.preflight.client import ClientPlan, check_client_plan

    plan = ClientPlan(
        invite=invite,
        key=key,
        data=data,
        out=out,
        validation=validation,
        validation_fraction=validation_fraction,
        model=model,
        policy=policy,
        privacy_ledger=privacy_ledger,
        group_key=group_key,
        job=job,
        digest=digest,
        timeout_s=connect_timeout,
    )
    _run(format, lambda rows: check_client_plan(plan, rows, datetime.now(UTC)))


def _run(format: Format, look: Callable[[Checklist], None]) -> None:
    rows = Checklist(lambda check: emit(format, {"event": "check", **asdict(check)}))
    with _quiet():
        look(rows)
    if format is Format.TXT:
        show(rows.rows, Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS))
    data: dict[str, Any] = {"checks": [asdict(check) for check in rows.rows]}
    if not rows.failed:
        warnings = sum(check.status is Status.WARN for check in rows.rows)
        succeed(format, f"nothing failed, {warnings} to look at" if warnings else "all is well", data)
        return
    error = ChecksFailed(
        f"{len(rows.failed)} of {len(rows.rows)} checks failed: {', '.join(check.name for check in rows.failed)}",
        hint=rows.failed[0].mend,
    )
    fail(error, machine=format is not Format.TXT, data=data)
    raise typer.Exit(error.exit_code)


def show(checks: list[Check], console: Console) -> None:
    """The rows as a table; what to do stands under what was found. Colours only where the console has them."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for check in checks:
        found = Text(check.found)
        if check.mend:
            found.append(f"\n-> {check.mend}")
        table.add_row(Text(check.status, style=STYLES[check.status]), Text(check.name), found)
    console.print(table)


@contextmanager
def _quiet() -> Iterator[None]:
    """Logs of the parts that are tried out would repeat the rows."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
