"""The commands `flglm loadtest` and, for its own processes, `loadtest-crowd`."""

import signal
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from launcher.output import Format, FormatOption, emit, succeed
from loadtest.plan import Plan
from shared.errors import UsageError
from shared.job import load_job
from shared.logs import configure
from shared.yaml_files import describe

DEFAULTS = Plan()


def loadtest(
    clients: Annotated[int, typer.Option("--clients", min=1, help="simulated clients")] = DEFAULTS.clients,
    seconds: Annotated[float, typer.Option("--seconds", help="how long to measure, after the ramp")] = DEFAULTS.seconds,
    ramp: Annotated[float, typer.Option("--ramp", min=0, help="seconds over which they come")] = DEFAULTS.ramp_s,
    think: Annotated[
        float, typer.Option("--think", min=0, help="mean seconds between a client's steps; 0: as fast as it goes")
    ] = DEFAULTS.think_s,
    pace_spread: Annotated[
        float, typer.Option("--pace-spread", min=0, max=3, help="how much clients differ in that (lognormal sigma)")
    ] = DEFAULTS.pace_spread,
    rows: Annotated[int, typer.Option("--rows", min=1, help="rows of a request")] = DEFAULTS.rows,
    shortest: Annotated[int, typer.Option("--shortest", min=1, help="tokens of the shortest row")] = DEFAULTS.shortest,
    longest: Annotated[int, typer.Option("--longest", min=1, help="tokens of the longest row")] = DEFAULTS.longest,
    churning: Annotated[
        float, typer.Option("--churning", min=0, max=1, help="share of clients that come and go")
    ] = DEFAULTS.churning,
    stay: Annotated[float, typer.Option("--stay", help="mean seconds that those stay")] = DEFAULTS.stay_s,
    slow: Annotated[float, typer.Option("--slow", min=0, max=1, help="share that reads slowly")] = DEFAULTS.slow,
    malicious: Annotated[
        float, typer.Option("--malicious", min=0, max=1, help="share that is admitted and sends garbage")
    ] = DEFAULTS.malicious,
    malice: Annotated[
        float, typer.Option("--malice", min=0, help="messages a second that each of those sends")
    ] = DEFAULTS.malice_per_s,
    processes: Annotated[int, typer.Option("--processes", min=1, help="processes for the clients")] = 1,
    hidden_size: Annotated[
        int, typer.Option("--hidden-size", min=8, help="d of the random model, a multiple of 4")
    ] = DEFAULTS.hidden_size,
    model: Annotated[str | None, typer.Option("--model", help="a real model for the server's trunk")] = None,
    server_threads: Annotated[int, typer.Option("--server-threads", min=1, help="the server's, for arithmetic")] = 1,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="folder for report.html, report.json and logs")] = None,
    format: FormatOption = Format.TXT,
) -> None:
    """Load a real broker and server on this machine with many simulated clients, and report what they bear."""
    from loadtest.measure import Sample, measure
    from loadtest.report import describe_in_words, event_of, write_report
    from loadtest.summary import summarise
    from loadtest.view import LiveView

    configure("loadtest")
    if model is not None:
        hidden_size = _hidden_size(model)
    try:
        plan = Plan(
            clients=clients, seconds=seconds, ramp_s=ramp, think_s=think, pace_spread=pace_spread, rows=rows,
            shortest=shortest, longest=longest, churning=churning, stay_s=stay, slow=slow, malicious=malicious,
            malice_per_s=malice, processes=processes, hidden_size=hidden_size, seed=seed,
        )  # fmt: skip
    except ValidationError as error:
        raise UsageError(describe(error, Plan)) from None
    if out is not None and out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty", hint="name another --out")
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        LiveView(plan, console, enabled=format is Format.TXT and console.is_terminal) as view,
    ):
        folder = Path(scratch) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)

        def observe(sample: Sample) -> None:
            emit(format, event_of(sample))
            view.show(sample)

        signal.signal(signal.SIGTERM, _interrupt)
        samples = measure(plan, folder, model, server_threads, observe)
        summary = summarise(plan, samples)
        if out is not None:
            write_report(summary, samples, out)
    succeed(format, describe_in_words(summary, out), summary)


def crowd(
    plan: Annotated[Path, typer.Option("--plan")],
    scene: Annotated[Path, typer.Option("--scene")],
    broker: Annotated[str, typer.Option("--broker")],
    first: Annotated[int, typer.Option("--first", min=0)],
    format: FormatOption = Format.TXT,
) -> None:
    """A share of a load test's clients, in a process of its own."""
    from loadtest.crowd import Crowd, Scene

    configure("crowd")
    loaded = Plan.model_validate_json(plan.read_text())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    made = Crowd(Scene(loaded, scene / "keys", broker, load_job(scene / "job.yaml").digest()), first, loaded.processes)

    def report(event: dict[str, Any]) -> None:
        emit(format, event)

    made.run(report, stop.is_set)
    succeed(format, "gone", {})


def _hidden_size(model: str) -> int:
    from shared.model.checkpoint import Checkpoint

    size: int = Checkpoint(model).config.hidden_size
    return size


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
