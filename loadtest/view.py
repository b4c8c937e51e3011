"""A load test, live: a table that changes on a terminal, nothing elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.measure import Sample
from loadtest.plan import Plan
from loadtest.summary import MB, memory_mb


class LiveView:
    """Shows the latest sample."""

    def __init__(self, plan: Plan, console: Console, *, enabled: bool) -> None:
        self.plan = plan
        self.live = Live(console=console, transient=True, auto_refresh=False) if enabled else None

    def __enter__(self) -> "LiveView":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, sample: Sample) -> None:
        if self.live is not None:
            self.live.update(table(self.plan, sample), refresh=True)


def table(plan: Plan, sample: Sample) -> Table:
    """One sample as a table."""
    sums, span = sample.counts.sums, sample.span_s
    when = "measuring" if sample.measured else "clients are coming"
    made = Table(title=f"load test, {sample.at:.0f} s: {when}", show_header=False, min_width=56)
    made.add_row("sessions", f"{sample.sessions:,} of {plan.clients:,}")
    made.add_row("honest clients", ", ".join(f"{count:,} {state}" for state, count in sorted(sample.states.items())))
    made.add_row("requests", f"{sums['requests'] / span:,.0f}/s, {sums['tokens'] / span:,.0f} tokens/s")
    made.add_row("on the wire", f"{(sums['bytes_up'] + sums['bytes_down']) / MB / span:,.1f} MB/s")
    for kind, latencies in sample.counts.latencies.items():
        if latencies.count:
            p50, p95, p99 = (1000 * (latencies.percentile(share) or 0) for share in (0.5, 0.95, 0.99))
            made.add_row(f"{kind} p50, p95, p99", f"{p50:,.0f}, {p95:,.0f}, {p99:,.0f} ms")
    made.add_row("server's queue", f"{sample.server['flglm_server_queue_requests']:,.0f} requests")
    made.add_row("memory", ", ".join(f"{role} {memory_mb(sample, role):,.0f} MB" for role in ("broker", "server")))
    errors = ", ".join(f"{count} {code}" for code, count in sample.counts.errors.most_common(3))
    made.add_row("errors in this second", errors or "none")
    return made
