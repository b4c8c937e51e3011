"""The command `flglm top`."""

import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from launcher.output import Format, FormatOption, emit, succeed
from launcher.scrape import scrape
from launcher.top import Look, figures, missed, table
from shared.errors import ConnectionFailed


def top(
    addresses: Annotated[list[str], typer.Argument(help="--metrics-address of each role to watch")],
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="seconds between two looks")] = 2.0,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="stop after so many; until Ctrl-C without")
    ] = None,
    format: FormatOption = Format.TXT,
) -> None:
    """Watch brokers and servers live: sessions, queue, cohort sizes, waits, rates, memory."""
    console = Console()
    looks = [_look(address) for address in addresses]
    if all(look.trouble for look in looks):
        raise ConnectionFailed(looks[0].trouble, hint="start the role with --metrics-address, and name it here")
    count = 1 if format is Format.JSON else count
    shown: list[dict[str, float | str]] = []
    with Live(console=console, auto_refresh=False, screen=console.is_terminal and count is None) as live:
        while count is None or count > 0:
            time.sleep(interval)
            before, looks = looks, [_look(address) for address in addresses]
            shown = [figures(earlier, now) for earlier, now in zip(before, looks, strict=True)]
            if format is Format.TXT:
                live.update(table(list(zip(looks, shown, strict=True))), refresh=True)
            for document in _documents(looks, shown):
                emit(format, {"event": "look", **document})
            count = None if count is None else count - 1
    if format is not Format.TXT:
        succeed(format, "", {"roles": _documents(looks, shown)})


def _look(address: str) -> Look:
    """Raises UsageError for what is no address."""
    try:
        return Look(address, time.monotonic(), scrape(address))
    except ConnectionFailed as error:
        return missed(address, time.monotonic(), error)


def _documents(looks: Sequence[Look], shown: Sequence[dict[str, float | str]]) -> list[dict[str, float | str]]:
    return [{"address": look.address, **values} for look, values in zip(looks, shown, strict=True)]
