"""`flglm partition`: one file's rows dealt to clients, as studies of non-IID data do it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from launcher.output import Format, FormatOption, succeed
from shared.errors import UsageError

MAX_CLIENTS = 4096
# Where numpy's Dirichlet has been tried: below, all of a draw's mass is one entry's anyway.
ALPHA_RANGE = (1e-4, 1e6)
PIPE_COLUMNS = 200


@dataclass(frozen=True)
class Rule:
    """How rows are dealt: by the values of `field`, by Dirichlet(`value`) over `field`, by sizes alone, or alike."""

    kind: Literal["field", "dirichlet", "power", "dirichlet_sizes", "iid"]
    value: float = 0.0
    field: str | None = None

    def words(self) -> str:
        return {
            "field": f"by the values of {self.field}",
            "dirichlet": f"Dirichlet({self.value:g}) over {self.field}",
            "power": f"sizes by a power law of exponent {self.value:g}",
            "dirichlet_sizes": f"sizes by Dirichlet({self.value:g})",
            "iid": "alike (IID)",
        }[self.kind]


def partition(
    file: Annotated[Path, typer.Argument(help="rows, one JSON object a line")],
    out: Annotated[Path, typer.Option("--out", help="a new folder: a JSONL file a client, partition.json, .html")],
    clients: Annotated[
        int | None,
        typer.Option("--clients", min=1, max=MAX_CLIENTS, help="how many; with --by the field's values if not said"),
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="field=NAME: rows that have the same value there stay together")
    ] = None,
    dirichlet: Annotated[
        float | None,
        typer.Option("--dirichlet", help="alpha: mixes of --label drawn from Dirichlet(alpha); small is unlike"),
    ] = None,
    quantity_skew: Annotated[
        str | None,
        typer.Option("--quantity-skew", help="power=EXPONENT or dirichlet=BETA: clients of unlike sizes, rows alike"),
    ] = None,
    iid: Annotated[bool, typer.Option("--iid", help="clients alike, in sizes and rows")] = False,
    label: Annotated[str | None, typer.Option("--label", help="the field to deal by or, otherwise, to count")] = None,
    min_rows: Annotated[
        int, typer.Option("--min-rows", min=0, help="fewer rows at a client are an error; 0 allows empty clients")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="the same seed, the same files")] = 0,
    format: FormatOption = Format.TXT,
) -> None:
    """Deal one file's rows to clients: by a field, by Dirichlet over labels, by size, or alike. No row is altered."""
    rule = _rule(by, dirichlet, quantity_skew, iid, label)
    if clients is None and rule.kind != "field":
        raise UsageError("Missing option '--clients'", hint="only --by field=NAME knows how many clients there are")
    from launcher.partition.files import NewFolder, index_rows, write_clients
    from launcher.partition.summary import Summary, count_rows, table, write_summary

    counted = label or (rule.field if rule.kind == "field" else None)
    rows = index_rows(file, [field for field in dict.fromkeys((rule.field, counted)) if field is not None])
    assigned = _deal(rule, rows.labels.get(rule.field or "", ()), len(rows.places), clients, seed)
    count = max(assigned) + 1 if clients is None else clients
    width = len(str(count - 1))
    names = [f"client-{number:0{width}d}.jsonl" for number in range(count)]
    got = count_rows(assigned, None if counted is None else rows.labels[counted], names)
    poorest = min(got, key=lambda client: client.rows)
    if poorest.rows < min_rows:
        raise UsageError(
            f"{poorest.file} would get {poorest.rows} rows, fewer than --min-rows {min_rows}",
            hint="take fewer --clients, less skew, another --seed, or a lower --min-rows (0 allows empty clients)",
        )
    summary = Summary(str(file), rule.words(), counted, seed, len(rows.places), rows.blank_lines, got)
    with NewFolder(out) as draft:
        write_clients(rows, assigned, names, draft)
        write_summary(summary, draft)
    if format is Format.TXT:
        Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table(summary))
    empty = f"; without rows: {', '.join(summary.empty)}" if summary.empty else ""
    text = f"{summary.rows:,} rows to {len(got):,} clients in {out}{empty}"
    succeed(format, text, summary.data() | {"out": str(out)})


def _rule(by: str | None, dirichlet: float | None, skew: str | None, iid: bool, label: str | None) -> Rule:
    """The one rule that was chosen. Raises UsageError."""
    given = {"--by": by, "--dirichlet": dirichlet, "--quantity-skew": skew, "--iid": iid or None}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise UsageError(f"{' and '.join(chosen) or 'no rule'} given; rows are dealt by one of {', '.join(given)}")
    if by is not None:
        kind, _, field = by.partition("=")
        if kind != "field" or not field:
            raise UsageError(f"--by {by}: expected field=NAME", hint=f"--by field={by}")
        return Rule("field", field=field)
    if dirichlet is not None:
        if label is None:
            raise UsageError("--dirichlet needs --label", hint="name the field whose mix is to differ")
        return Rule("dirichlet", _within("--dirichlet", dirichlet, *ALPHA_RANGE), label)
    return Rule("iid") if skew is None else _skew(skew)


def _skew(words: str) -> Rule:
    kind, _, value = words.partition("=")
    try:
        number = float(value)
    except ValueError:
        kind = ""
    if kind == "power":
        return Rule("power", _within("--quantity-skew power", number, 0.0, 10.0))
    if kind == "dirichlet":
        return Rule("dirichlet_sizes", _within("--quantity-skew dirichlet", number, *ALPHA_RANGE))
    raise UsageError(f"--quantity-skew {words}: expected power=EXPONENT or dirichlet=BETA")


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise UsageError(f"{name} {value:g} is not between {low:g} and {high:g}")
    return value


def _deal(rule: Rule, labels: Sequence[str], rows: int, clients: int | None, seed: int) -> list[int]:
    from launcher.partition import rules

    if rule.kind == "field":
        return rules.by_field(labels, clients)
    assert clients is not None
    if rule.kind == "dirichlet":
        return rules.by_dirichlet(labels, clients, rule.value, seed)
    if rule.kind == "power":
        shares = rules.power_law_shares(clients, rule.value)
    elif rule.kind == "dirichlet_sizes":
        shares = rules.dirichlet_shares(clients, rule.value, seed)
    else:
        shares = rules.equal_shares(clients)
    return rules.by_size(rows, shares, seed)
