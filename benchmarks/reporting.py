"""What every benchmark prints: a table on standard error, with --json one object on standard output."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """A figure and what it should be; `at_most` or at least."""

    name: str
    figure: float
    goal: float
    at_most: bool

    @property
    def holds(self) -> bool:
        return self.figure <= self.goal if self.at_most else self.figure >= self.goal


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """An argument parser with --json and --quick."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--json", action="store_true", help="one JSON object on standard output")
    made.add_argument("--quick", action="store_true", help="a run under a minute")
    return made


def publish(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: Mapping[str, Any],
    goals: Sequence[Goal],
    *,
    as_json: bool,
) -> None:
    """Print the table and the goals for people; the object for machines if asked."""
    console = Console(stderr=True)
    table = Table(title=f"benchmarks.{name}")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for goal in goals:
        sign, verdict = ("<=" if goal.at_most else ">="), ("holds" if goal.holds else "DOES NOT HOLD")
        console.print(f"{goal.name}: {goal.figure:.4g} (goal {sign} {goal.goal:g}): {verdict}")
    if as_json:
        document = {
            "benchmark": name,
            "figures": dict(figures),
            "goals": [
                {key: value for key, value in asdict(goal).items() if key != "at_most"} | {"holds": goal.holds}
                for goal in goals
            ],
        }
        print(json.dumps(document))
