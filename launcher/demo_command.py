"""`flglm demo`: the command line of launcher/demo.py."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.output import Format, FormatOption, succeed


def demo(
    out: Annotated[Path, typer.Option("--out", help="folder for the report and all that the demo makes")] = Path(
        "demo-out"
    ),
    model: Annotated[
        str | None, typer.Option("--model", help="a real checkpoint (folder or hub id) instead of the demo's own")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="with --model: a folder with one JSONL file a client")
    ] = None,
    job: Annotated[
        Path | None, typer.Option("--job", help="a job file to start from; model and number of clients are the demo's")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="how many steps to train")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of data, model and order")] = 0,
    format: FormatOption = Format.TXT,
) -> None:
    """Three hospitals train one model together: a broker, a server and three clients as processes on this machine."""
    from launcher.demo import DemoSettings, run_demo

    report = run_demo(DemoSettings(out=out, model=model, data=data, job=job, steps=steps, seed=seed), format)
    if format is not Format.TXT:
        succeed(format, "", report.model_dump(mode="json"))
