"""A client's progress for the person who watches it."""

from collections.abc import Sequence
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ClientProgress:
    """A bar with loss, tokens/s and the share of time spent waiting for the server; notes for rounds and rows.

    Where no bar is drawn (a log, a pipe), a line for every round that is done.
    """

    def __init__(self, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self.bar_is_drawn = enabled and console.is_terminal
        self.losses: list[float] = []
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not enabled,
            transient=True,
        )
        self.task = self.progress.add_task("waiting", total=None, note="")

    def __enter__(self) -> "ClientProgress":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "data":
                self.progress.console.print(_data_line(event))
                self.progress.update(self.task, total=event["total_steps"])
            case "updates" if event["handed_in"]:
                self.progress.console.print(_updates_line(event))
            case "members":
                self.progress.console.print(
                    f"updates are summed with those of {len(event['names'])} members, roster {event['fingerprint']}"
                    + ("" if event["roster"] else " (not checked: no roster in a policy)")
                )
            case "update_clipped":
                self.progress.console.print(
                    f"{event['values']} values of round {event['round'] + 1}'s update were clipped to {event['to']:g}"
                )
            case "shares_refused":
                self.progress.console.print(f"left out of the sum of round {event['round'] + 1}: {event['reason']}")
            case "resumed":
                self.progress.console.print(f"resumed after {event['rounds']} rounds")
            case "round":
                self.losses = []
                self.progress.update(self.task, description=f"round {event['round'] + 1}")
            case "evaluation":
                self.progress.console.print(
                    f"after {event['rounds']} rounds: held-out loss {event['loss']:.4f}, "
                    f"accuracy {event['accuracy']:.1%} of {event['rows']} rows"
                )
            case "round_done" if not self.bar_is_drawn:
                self.progress.console.print(_round_line(event, self.losses))
            case "step":
                self.losses.append(event["loss"])
                self.progress.update(self.task, completed=event["step"] + 1, note=_step_note(event))
            case "finished_before":
                self.progress.console.print(f"this job was finished before: its result is in {event['out']}")
            case "checkpoint_unreadable":
                self.progress.console.print(f"{event['reason']}; the one before is used")
            case "update_refused":
                self.progress.console.print(
                    f"this client's update of round {event['round'] + 1} was left out: {event['reason']}"
                )
            case "left_behind":
                self.progress.console.print(f"round {event['round'] + 1} went on without this client; joining the next")
            case "privacy":
                for line in privacy_lines(event):
                    self.progress.console.print(line)
            case "privacy_spent":
                self.progress.console.print(
                    f"privacy: {event['rounds']} rounds cost epsilon {event['epsilon']:.4g} at delta {event['delta']:g}"
                )
            case "update_repeated":
                self.progress.console.print(f"the update of round {event['round'] + 1} is handed in again, as it was")
            case "rounds_missed":
                self.progress.console.print(f"the others are at round {event['round'] + 1}; joining there")


def privacy_lines(event: dict[str, Any]) -> list[str]:
    """What a private job covers, what it does not, and what it costs."""
    before = event["spent_before"]
    return [
        f"privacy: {event['type']}, covers {event['covers']}; not covered: {event['does_not_cover']}",
        f"privacy: all rounds cost epsilon {event['epsilon_of_all_rounds']:.4g} at delta {event['delta']:g}; all jobs "
        f"before, {before['total_epsilon']:.4g} at {before['total_delta']:g} ({event['ledger']})",
    ]


def _data_line(event: dict[str, Any]) -> str:
    notes = [f"{event['rows']} rows to train on, {event['validation_rows']} held out"]
    notes += [f"{event[key]} {words}" for key, words in _LEFT_OUT.items() if event[key]]
    return "; ".join(notes)


def _updates_line(event: dict[str, Any]) -> str:
    if event["secure"] == "off":
        return f"updates are not masked: {event['why_off']}"
    return f"updates are masked ({event['secure']}): {event['seen']}"


def _round_line(event: dict[str, Any], losses: Sequence[float]) -> str:
    loss = f"mean loss {fmean(losses):.4f}, " if losses else ""
    return f"round {event['round'] + 1} of {event['of']}: {loss}{event['seconds']:.1f} s"


_LEFT_OUT = {
    "truncated": "cut to the longest length",
    "skipped_long": "left out as too long",
    "without_target": "left out: no token that counts",
}


def _step_note(event: dict[str, Any]) -> str:
    seconds = max(event["seconds"], 1e-9)
    rate, waiting = event["tokens"] / seconds, event["waited_s"] / seconds
    return f"loss {event['loss']:.4f}  {rate:,.0f} tokens/s  waiting {waiting:.0%}"
