"""`flglm eval`: how good a model is, on rows and on tasks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from launcher.output import Format, FormatOption, emit, succeed
from shared.errors import UsageError
from shared.identity import load_identity
from shared.invitations import load_invitation
from shared.logs import configure

if TYPE_CHECKING:
    from worker_client.evaluation.model import Model
    from worker_client.evaluation.run import Result

PIPE_COLUMNS = 200


def evaluate(
    task: Annotated[
        list[str],
        typer.Option("--task", help="NAME=FILE, as often as wanted: rows, boolq, cb, ...; an unknown name lists all"),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="a folder or hub id; with --invite: this site's copy of the job's model"),
    ] = None,
    trained: Annotated[
        Path | None, typer.Option("--trained", help="with what a job trained: the --out folder of 'client train'")
    ] = None,
    server_state: Annotated[
        Path | None, typer.Option("--server-state", help="with --trained: the server's --state folder, for the trunk")
    ] = None,
    invite: Annotated[
        Path | None, typer.Option("--invite", help="the joint model through the running server: the invitation to it")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="with --invite: this client's .key file")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="with --invite: the --out folder of 'client train', for head and tail")
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", help="with --invite: what this site accepts, YAML")] = None,
    connect_timeout: Annotated[
        float, typer.Option("--connect-timeout", min=0.1, help="with --invite: seconds to wait for broker and server")
    ] = 30.0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="only the first N records of each file")] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="rows and prompts are cut there; never above the model's")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="of a summary")] = 64,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; without --invite")] = "cpu",
    format: FormatOption = Format.TXT,
) -> None:
    """Loss on rows, SuperGLUE and other tasks, summaries: of a whole model here, or of the joint model in a session."""
    from transformers.utils.logging import set_verbosity_error

    from worker_client.evaluation.run import Settings
    from worker_client.evaluation.run import evaluate as run

    asked = [named_file(words) for words in task]
    set_verbosity_error()  # of rows longer than the model takes; they are counted here
    settings = Settings(limit, max_length, max_new_tokens)
    results: list[Result] = []
    if invite is None:
        if key or out or policy:
            raise UsageError("--key, --out and --policy need --invite", hint="--trained: with all parts at hand")
        opened: AbstractContextManager[Model] = _local_model(model, trained, server_state, device)
    else:
        if trained or server_state or device != "cpu":
            raise UsageError(
                "--trained, --server-state and --device do not go with --invite: the trunk is the server's"
            )
        opened = _joint_model(invite, key, out, model, policy, connect_timeout)
    with opened as loaded, _progress(format) as bars:
        for name, file in asked:
            result = run(loaded, name, file, settings, _moves(bars, name))
            results.append(result)
            emit(format, {"event": "result", **asdict(result)})
    if format is Format.TXT:
        Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table(results))
    else:
        succeed(format, "", {"model": model, "results": [asdict(result) for result in results]})


@contextmanager
def _local_model(model: str | None, trained: Path | None, server_state: Path | None, device: str) -> "Iterator[Model]":
    from worker_client.evaluation.local_model import Trained, load_local_model

    if model is None:
        raise UsageError("Missing option '--model'", hint="or --invite, --key and --out: through the running server")
    if server_state is not None and trained is None:
        raise UsageError("--server-state needs --trained", hint="which holds the head, the tail and the job")
    yield load_local_model(model, device=device, trained_by=None if trained is None else Trained(trained, server_state))


@contextmanager
def _joint_model(
    invite: Path, key: Path | None, out: Path | None, model: str | None, policy: Path | None, connect_timeout_s: float
) -> "Iterator[Model]":
    from worker_client.evaluation.joint_model import SessionSettings, joint_model
    from worker_client.policy import Policy, load_policy

    if key is None or out is None:
        raise UsageError("--invite needs --key and --out", hint="as they were given to 'flglm client train'")
    configure("client", verbose=False)
    identity, invitation = load_identity(key), load_invitation(invite, datetime.now(UTC))
    accepted = Policy() if policy is None else load_policy(policy)
    with joint_model(SessionSettings(out, model, connect_timeout_s, accepted), invitation, identity) as joint:
        print(f"head and tail: {joint.source}; trunk: {invitation.server}", file=sys.stderr)
        yield joint


def named_file(words: str) -> tuple[str, Path]:
    """NAME=FILE of a known task. Raises UsageError."""
    from worker_client.evaluation.tasks import TASKS

    name, _, file = words.partition("=")
    if not file:
        raise UsageError(f"--task {words}: expected NAME=FILE", hint="tasks: " + ", ".join(TASKS))
    if name not in TASKS:
        raise UsageError(f"no task '{name}'", hint="tasks: " + ", ".join(TASKS))
    return name, Path(file)


def table(results: "list[Result]") -> Table:
    """A row a task."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("task", "metrics", "chance", "examples", "cut", "seconds"):
        shown.add_column(heading, justify="left" if heading in ("task", "metrics") else "right")
    for result in results:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        chance = "" if result.chance is None else f"{result.chance:.3f}"
        shown.add_row(result.task, metrics, chance, f"{result.examples:,}", f"{result.cut:,}", f"{result.seconds:.1f}")
    return shown


def _moves(bars: Progress, name: str) -> Callable[[int, int], None]:
    bar = bars.add_task(name, total=None)
    return lambda done, of: bars.update(bar, completed=done, total=of)


def _progress(format: Format) -> Progress:
    """Bars on a terminal, none elsewhere."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=format is not Format.TXT or not console.is_terminal,
        transient=True,
    )
