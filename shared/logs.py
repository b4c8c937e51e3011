"""Logs that a person can follow: a line an event; JSON lines where no person reads. Never a payload or a key."""

import json
import logging
import sys
import time
from typing import Literal

Scalar = str | int | float | bool | bytes | None
SHORT_ID_CHARS = 8
MAX_BYTES = 16


def configure(role: str, *, verbose: bool = False, format: Literal["txt", "json"] | None = None) -> None:
    """Log to standard error; without `format`, text on a terminal and JSON lines elsewhere."""
    as_text = sys.stderr.isatty() if format is None else format == "txt"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Text(role) if as_text else _Json(role))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def event(logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: Scalar) -> None:
    """Log event `name` with scalar fields. Ids of up to 16 bytes are shown by their first 8 hex digits.

    Raises TypeError for anything longer or deeper: that would be a payload or a key.
    """
    shown: dict[str, str | int | float | bool | None] = {}
    for key, value in fields.items():
        if isinstance(value, bytes):
            if len(value) > MAX_BYTES:
                raise TypeError(f"{len(value)} bytes do not belong in a log ({key})")
            shown[key] = value.hex()[:SHORT_ID_CHARS]
        elif value is None or isinstance(value, str | int | float | bool):
            shown[key] = value
        else:
            raise TypeError(f"a {type(value).__name__} does not belong in a log ({key})")
    logger.log(level, name, extra={"fields": shown})


class _Text(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f"  {key}={_one_line(value)}" for key, value in getattr(record, "fields", {}).items())
        return f"{when} {record.levelname:7} {self.role:7} {record.getMessage()}{fields}"


def _one_line(value: str | int | float | bool | None) -> str:
    """Text from outside must not forge a line or steer the terminal."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


class _Json(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        head = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "role": self.role,
            "event": record.getMessage(),
        }
        return json.dumps(head | getattr(record, "fields", {}))
