"""The rows of a JSONL file as the bytes that they are: where each lies, its labels, and a copy for each client."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import DataError, UsageError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class IndexedRows:
    """Where each row begins and how many bytes it has, end of line included; the labels by field; lines left out."""

    path: Path
    places: tuple[tuple[int, int], ...]
    labels: dict[str, tuple[str, ...]]
    blank_lines: int


def index_rows(path: Path, fields: Sequence[str]) -> IndexedRows:
    """Read every line; each must be a JSON object with a text, a number or a truth value in each of `fields`.

    Raises DataError naming file, line and reason.
    """
    places: list[tuple[int, int]] = []
    labels: dict[str, list[str]] = {field: [] for field in fields}
    blank = 0
    try:
        with path.open("rb") as file:
            for number, start, line in _lines(file):
                if not line.strip():
                    blank += 1
                    continue
                record = _parsed(line, f"{path}:{number}")
                for field in fields:
                    labels[field].append(_label(record, field, f"{path}:{number}"))
                places.append((start, len(line)))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not places:
        raise DataError(f"{path}: no row")
    return IndexedRows(path, tuple(places), {field: tuple(values) for field, values in labels.items()}, blank)


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Number, place and bytes of each line. A byte order mark belongs to the file, not to its first row."""
    start = 0
    for number, line in enumerate(file, start=1):
        marked = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
        yield number, start + marked, line[marked:]
        start += len(line)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error})", hint="one JSON object a line is dealt out, no other format"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a JSON object")
    return record


def _label(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(f"{where}: no field '{field}'; there are {', '.join(sorted(record)[:12]) or 'none'}")
    value = record[field]
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise DataError(f"{where}: '{field}' is neither text, number nor truth value", hint="name a field with few values")


def write_clients(rows: IndexedRows, assigned: Sequence[int], names: Sequence[str], folder: Path) -> None:
    """A file a client: its rows as they were and in the file's order, each ended by the end of line that it had, or by
    one if the file ended without. OSError if the disk refuses.
    """
    mine: list[list[tuple[int, int]]] = [[] for _ in names]
    for place, client in zip(rows.places, assigned, strict=True):
        mine[client].append(place)
    with rows.path.open("rb") as source:
        for name, places in zip(names, mine, strict=True):
            with (folder / name).open("wb") as target:
                for start, length in places:
                    source.seek(start)
                    line = source.read(length)
                    target.write(line if line.endswith(b"\n") else line + b"\n")


class NewFolder:
    """A folder that is there with all its files or not at all: written beside its place, then renamed.

    Entering gives the draft to write in. Raises UsageError if something lies in its place or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.draft = folder.parent / f".{folder.name}.draft-{os.getpid()}"

    def __enter__(self) -> Path:
        if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise UsageError(f"{self.folder} is there already, and not empty", hint="give --out another folder")
        try:
            self.draft.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: cannot be made ({error.strerror})", hint="give --out another folder"
            ) from None
        return self.draft

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self.draft.rename(self.folder)
        except OSError as refused:
            raise UsageError(f"{self.folder}: cannot be written ({refused.strerror})") from None
        finally:
            shutil.rmtree(self.draft, ignore_errors=True)
        if isinstance(error, OSError):
            raise UsageError(
                f"{self.folder}: cannot be written ({error.strerror})", hint="make room on that disk"
            ) from None
