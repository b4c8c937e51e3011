"""What commands print: text for people on standard error and out, one JSON object or JSON lines for machines."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from shared.errors import FlglmError, Refused

SCHEMA_VERSION = "1"


class Format(StrEnum):
    """`txt` for people, `json` for one object at the end, `jsonl` for events as they come."""

    TXT = "txt"
    JSON = "json"
    JSONL = "jsonl"


FormatOption = Annotated[Format, typer.Option("--format", help="txt for people, json or jsonl for machines")]


def succeed(format: Format, text: str, data: dict[str, Any]) -> None:
    """The result of a command: `text` for people, `data` for machines."""
    if format is Format.TXT:
        print(text)
    else:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "status": "ok", "data": data}))


def emit(format: Format, event: dict[str, Any]) -> None:
    """An event of a long-running command, for whoever reads JSON lines."""
    if format is Format.JSONL:
        print(json.dumps(event), flush=True)


def fail(error: FlglmError, *, machine: bool, data: dict[str, Any] | None = None) -> None:
    """One line that says what is wrong, and one that says what to change; as JSON on standard output if asked.

    `data`: what a command has found out all the same, for machines.
    """
    code = error.reason if isinstance(error, Refused) else error.code
    if machine:
        document = {"schema_version": SCHEMA_VERSION, "status": "error", "error_code": code, "message": error.message}
        if error.hint:
            document["hint"] = error.hint
        print(json.dumps(document if data is None else document | {"data": data}), flush=True)
    print(f"flglm: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"       {error.hint}", file=sys.stderr)
