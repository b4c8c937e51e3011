"""Before `flglm broker`: its key, its lists, its addresses."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launcher.preflight.checks import Checklist, fail
from launcher.preflight.files import check_cards, check_clock, identity_of
from launcher.preflight.network import check_free, check_metrics
from shared.errors import UsageError
from shared.wire.curve import check_plain


@dataclass(frozen=True)
class BrokerPlan:
    """What `flglm broker` would be told."""

    clients_address: str
    servers_address: str
    key: Path | None
    clients: Path
    servers: Path
    plain: bool
    metrics: str | None = None


def check_broker_plan(plan: BrokerPlan, rows: Checklist, now: datetime) -> None:
    addresses = {"clients address": plan.clients_address, "servers address": plan.servers_address}
    if (plan.key is None) != plan.plain:
        rows.add(fail("key", "a broker needs --key", "make one with 'flglm keys new broker', or say --plain"))
    if plan.key is not None:
        identity_of(rows, plan.key)
        rows.add(check_cards("clients", plan.clients))
        rows.add(check_cards("servers", plan.servers))
    else:
        _check_plain(addresses, rows)
    rows.add(check_clock(now, [path for path in (plan.key, plan.clients, plan.servers) if path is not None]))
    for row in check_free(addresses):
        rows.add(row)
    if plan.metrics is not None:
        rows.add(check_metrics(plan.metrics))


def _check_plain(addresses: dict[str, str], rows: Checklist) -> None:
    for name, address in addresses.items():
        try:
            check_plain(address)
        except UsageError as error:
            rows.add(fail(name, error.message, error.hint or "give the broker a key"))
