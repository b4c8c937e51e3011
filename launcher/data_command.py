"""`flglm data check`: what training would make of a file of rows."""

import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from launcher.output import Format, FormatOption, fail, succeed
from launcher.svg import plain
from shared.errors import DataError, JobError, UsageError
from shared.job import Job, load_job, parse_job

if TYPE_CHECKING:
    from worker_client.data_check import Example, Survey


TooLong = Literal["truncate", "skip"]


def check_data(
    file: Annotated[Path, typer.Argument(help="rows: JSON lines, or a .json, .csv or .parquet file")],
    job: Annotated[
        Path | None, typer.Option("--job", help="the job file: model, lengths and virtual tokens are as it says")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="without --job: the model, for its tokenizer (folder or hub id)")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="without --job: its data.max_length, by default 256; never more than the model takes, and as for a "
            "method without virtual tokens",
        ),
    ] = None,
    too_long: Annotated[
        TooLong | None, typer.Option("--too-long", help="without --job: its data.too_long, by default truncate")
    ] = None,
    format: FormatOption = Format.TXT,
) -> None:
    """Before training: shapes and lengths of the rows, what is cut or left out and why, the first row's tokens."""
    from transformers.utils.logging import set_verbosity_error

    from shared.model.checkpoint import checkpoint_of
    from shared.model.families import context_length
    from shared.model.methods import longest_row
    from worker_client.client import load_tokenizer
    from worker_client.data_check import survey

    set_verbosity_error()  # of rows longer than the model takes; they are counted here
    asked = _job_of(model, max_length, too_long) if job is None else _job_in(job, model, max_length, too_long)
    checkpoint = checkpoint_of(asked)
    limit = longest_row(asked, context_length(checkpoint.config))
    found = survey(file, load_tokenizer(checkpoint), max_length=limit, too_long=asked.data.too_long)
    if format is Format.TXT:
        console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
        for line in described(found):
            console.print(line)
        if found.example is not None:
            console.print(pictured(found.example))
    if not found.bad:
        succeed(format, f"{found.usable:,} of {found.rows:,} rows can be trained on", asdict(found))
        return
    for line in found.errors if format is Format.TXT else ():
        print(line, file=sys.stderr)
    lost = {f"longer than {limit} tokens": found.skipped_long, "no token counts in the loss": found.without_target}
    reasons = found.reasons | {reason: count for reason, count in lost.items() if count}
    counted = "; ".join(f"{count:,} x {reason}" for reason, count in reasons.items())
    what = f"{found.bad:,} of {found.rows:,} rows are none that training takes" if found.usable else "no usable row"
    error = DataError(
        f"{file}: {what} ({counted})",
        hint="mend or remove the lines that are named; README.md, 'Rows', shows the shapes",
    )
    fail(error, machine=format is not Format.TXT, data=asdict(found))
    raise typer.Exit(error.exit_code)


def _job_of(model: str | None, max_length: int | None, too_long: TooLong | None) -> Job:
    """A job of that model, without virtual tokens. Raises UsageError, JobError."""
    if model is None:
        raise UsageError("rows are cut as a job says", hint="name its file with --job, or its model with --model")
    given = {"max_length": max_length, "too_long": too_long}
    values = {
        "model_name_or_path": model,
        "data": {name: value for name, value in given.items() if value is not None},
        "training": {"per_device_train_batch_size": 1},  # rows are looked at one by one, however long
        "cohort": {"max_batch_tokens": 2**24},
    }
    return parse_job(values, "--model, --max-length, --too-long")


def _job_in(path: Path, model: str | None, max_length: int | None, too_long: TooLong | None) -> Job:
    """The job of the file. Raises JobError, for an option that says something else too."""
    job = load_job(path)
    for option, given, setting, value in (
        ("--model", model, "model_name_or_path", job.model_name_or_path),
        ("--max-length", max_length, "data.max_length", job.data.max_length),
        ("--too-long", too_long, "data.too_long", job.data.too_long),
    ):
        if given is not None and given != value:
            raise JobError(
                f"{option} {given} contradicts {path}: {setting}={value}", hint=f"leave out {option}, or --job"
            )
    return job


def described(found: "Survey") -> list[str]:
    """Lines for people."""
    lost = {
        f"cut at {found.max_length:,} tokens ({found.tokens_cut:,} tokens lost)": found.truncated,
        f"left out: longer than {found.max_length:,} tokens": found.skipped_long,
        "left out: no token counts in the loss": found.without_target,
        "bad": found.bad,
    }
    return [
        f"rows     {found.rows:,}" + "".join(f", {count:,} {what}" for what, count in lost.items() if count),
        "shapes   " + (", ".join(f"{name} {count:,}" for name, count in found.shapes.items()) or "none"),
        "tokens   " + _numbers(found.lengths),
        "in loss  " + _numbers(found.targets),
    ]


def _numbers(distribution: dict[str, float]) -> str:
    return ", ".join(f"{name} {plain(value)}" for name, value in distribution.items()) or "none"


def pictured(example: "Example") -> Text:
    """The tokens in order, those that count in the loss between brackets, and bold where the console can."""
    shown = Text(f"line {example.line}, {example.shape}; in [brackets] what counts in the loss:\n")
    for in_loss, tokens in groupby(example.tokens, key=lambda token: token.in_loss):
        # Whatever a row holds, it writes no control characters to a terminal.
        text = "|".join(repr(token.text)[1:-1] for token in tokens)
        shown.append(f"[{text}]" if in_loss else text, style="bold green" if in_loss else "dim")
    return shown
