"""The demo, live: a bar a client on a terminal, a line a round elsewhere."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shared.job import Job


class DemoView:
    """Shows the clients' events as they come."""

    def __init__(self, job: Job, names: list[str], console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("[bold]{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.tasks = {name: self.progress.add_task(name, total=job.total_steps, note="connecting") for name in names}

    def __enter__(self) -> "DemoView":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, name: str, event: dict[str, Any]) -> None:
        if name not in self.tasks:
            return
        if event.get("event") == "step":
            self.progress.update(self.tasks[name], completed=event["step"] + 1, note=f"loss {event['loss']:.3f}")
        elif event.get("event") == "evaluation":
            self.console.print(
                f"  after {event['rounds']:3} rounds  {name:12} held-out loss {event['loss']:.3f}, "
                f"accuracy {event['accuracy']:.1%}"
            )
