"""What each client got: counts by label, as plain data, as a table and as a page with a picture."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.markup import escape as escape_markup
from rich.table import Table

from launcher.html_page import html_page
from launcher.partition.stacked_bars import Stack, stacked_bars

TEMPLATE = Path(__file__).with_name("page.html")
# Labels with a column and a colour of their own; the others are shown as one.
SHOWN_LABELS = 7
OTHERS = "others"


@dataclass(frozen=True)
class ClientRows:
    """`labels`: rows by label, most first; without a label field none."""

    file: str
    rows: int
    labels: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """`rule`: how the rows were dealt, in words. `empty`: the files of clients without rows."""

    source: str
    rule: str
    label: str | None
    seed: int
    rows: int
    blank_lines: int
    clients: tuple[ClientRows, ...]

    @property
    def empty(self) -> list[str]:
        return [client.file for client in self.clients if client.rows == 0]

    def data(self) -> dict[str, Any]:
        return asdict(self) | {"labels": dict(self.by_label().most_common()), "empty": self.empty}

    def by_label(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for client in self.clients:
            counts.update(client.labels)
        return counts


def count_rows(assigned: Sequence[int], labels: Sequence[str] | None, names: Sequence[str]) -> tuple[ClientRows, ...]:
    """One entry a client, from the client of each row and, if there is a label, the label of each row."""
    counts: list[Counter[str]] = [Counter() for _ in names]
    for client, label in zip(assigned, labels or [""] * len(assigned), strict=True):
        counts[client][label] += 1
    return tuple(
        ClientRows(name, count.total(), dict(count.most_common()) if labels is not None else {})
        for name, count in zip(names, counts, strict=True)
    )


def shown_counts(summary: Summary) -> tuple[list[str], list[list[int]]]:
    """Names of the parts that are shown, and for each client how many rows each has."""
    labels = [label for label, _ in summary.by_label().most_common()]
    shown = labels if len(labels) <= SHOWN_LABELS + 1 else labels[:SHOWN_LABELS]
    parts = [[client.labels.get(label, 0) for label in shown] for client in summary.clients]
    if not labels:
        return ["rows"], [[client.rows] for client in summary.clients]
    if len(shown) == len(labels):
        return shown, parts
    rest = [client.rows - sum(part) for client, part in zip(summary.clients, parts, strict=True)]
    return [*shown, f"{len(labels) - len(shown)} {OTHERS}"], [[*p, r] for p, r in zip(parts, rest, strict=True)]


def table(summary: Summary) -> Table:
    """A row a client, a column a label."""
    names, counts = shown_counts(summary)
    shown = Table(title=f"{escape_markup(summary.source)}: {escape_markup(summary.rule)}", title_justify="left")
    shown.add_column("client")
    shown.add_column("rows", justify="right")
    columns = names if summary.label is not None else []
    for name in columns:
        shown.add_column(escape_markup(name), justify="right")
    for client, count in zip(summary.clients, counts, strict=True):
        shown.add_row(client.file, f"{client.rows:,}", *(f"{number:,}" for number in count[: len(columns)]))
    return shown


def write_summary(summary: Summary, folder: Path) -> None:
    """`partition.json` and `partition.html`."""
    (folder / "partition.json").write_text(json.dumps(summary.data(), indent=1) + "\n", encoding="utf-8")
    (folder / "partition.html").write_text(page(summary), encoding="utf-8")


def page(summary: Summary) -> str:
    """One page without scripts; every text from the rows is escaped."""
    names, counts = shown_counts(summary)
    stacks = [Stack(client.file, parts) for client, parts in zip(summary.clients, counts, strict=True)]
    return html_page(
        Path(summary.source).name,
        TEMPLATE,
        source=escape(Path(summary.source).name),
        rows=f"{summary.rows:,}",
        clients=f"{len(summary.clients):,}",
        rule=escape(summary.rule),
        label=escape("rows" if summary.label is None else f"rows by {summary.label}"),
        picture=stacked_bars(stacks, names, title="rows of each client", description=summary.rule),
    )
