"""`flglm privacy`: what a job with noise would cost, and what was spent on a file of rows."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from launcher.output import Format, FormatOption, succeed
from shared.errors import LedgerError

PIPE_COLUMNS = 200
# Those of a job (shared/job/privacy.py).
Multiplier = Annotated[
    float, typer.Option("--noise-multiplier", min=1e-6, max=1e3, help="privacy.noise_multiplier of the job")
]
DeltaOption = Annotated[float, typer.Option("--delta", min=1e-15, max=0.1, help="privacy.delta of the job")]


def plan(
    noise_multiplier: Multiplier,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=2**31 - 1, help="rounds that a client takes part in")],
    delta: DeltaOption,
    format: FormatOption = Format.TXT,
) -> None:
    """Before a job: the epsilon that so many rounds cost a client, whole updates being the unit."""
    from worker_client.privacy.accounting import epsilon

    cost = epsilon([(noise_multiplier, rounds)], delta)
    data = {"noise_multiplier": noise_multiplier, "rounds": rounds, "delta": delta, "epsilon": cost}
    succeed(
        format, f"epsilon {cost:.4g} at delta {delta:g}: {rounds} rounds, noise multiplier {noise_multiplier:g}", data
    )


def show(
    file: Annotated[Path, typer.Argument(help="a privacy ledger, by default beside the rows: ROWS.privacy.json")],
    delta: DeltaOption = 1e-5,
    format: FormatOption = Format.TXT,
) -> None:
    """What jobs spent, a line each, and all of them together at one delta."""
    from worker_client.privacy.accounting import epsilon
    from worker_client.privacy.ledger import epsilon_of, read_entries

    if not file.exists():
        raise LedgerError(f"{file}: no such file", hint="without --privacy-ledger it lies beside the rows")
    entries = read_entries(file)
    rows = [e.model_dump() | {"epsilon": epsilon([(e.noise_multiplier, e.rounds)], e.delta)} for e in entries]
    total = epsilon_of(entries, delta)
    if format is Format.TXT:
        table = Table(box=None, pad_edge=False)
        for heading in ("job", "digest", "rows", "privacy", "noise multiplier", "rounds", "epsilon", "delta"):
            table.add_column(heading, justify="left" if heading in ("job", "digest", "rows", "privacy") else "right")
        for e, row in zip(entries, rows, strict=True):
            shown = (e.name, e.job[:16], e.data[:16], e.type, f"{e.noise_multiplier:g}", f"{e.rounds:,}")
            table.add_row(*shown, f"{row['epsilon']:.4g}", f"{e.delta:g}")
        Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False).print(table)
    succeed(
        format,
        f"all together: epsilon {total:.4g} at delta {delta:g}",
        {"entries": rows, "epsilon": total, "delta": delta},
    )
