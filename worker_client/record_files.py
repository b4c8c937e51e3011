"""Records from files: JSON lines, a JSON list, CSV with a header, Parquet. What is in a record is no concern here.

The name's ending says which: .json, .csv, .parquet; everything else is JSON lines, and so is a .json file that does not
begin with a list. Parquet is read through the library `datasets` (extra "data"), as a stream: nothing is copied to its
cache. The rest needs the standard library alone.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from shared.errors import DataError, UsageError


@dataclass(frozen=True)
class Entry:
    """A record, or why there is none, and where: the line it begins at (of Parquet the row), from 1."""

    line: int
    record: dict[str, Any] | DataError


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines and records. Raises DataError naming file, line and reason at the first that is none."""
    for entry in read_entries(path):
        if isinstance(entry.record, DataError):
            raise entry.record
        yield entry.line, entry.record


def read_entries(path: Path) -> Iterator[Entry]:
    """All records of a file and all its lines that are none. Raises DataError for a file that cannot be read on, and
    UsageError if the library that reads it is missing.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet(path)
            return
        # csv asks for newline="". JSON does not mind.
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                yield from _csv(path, file)
            elif path.suffix.lower() == ".json":
                yield from _json(path, file.read())
            else:
                yield from _json_lines(path, file)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint="name a file of rows") from None


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _entry(path, number, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield Entry(number, DataError(f"{path}:{number}: not JSON ({error})"))


def _json(path: Path, text: str) -> Iterator[Entry]:
    """The items of a list, one after the other; where it breaks, there is no next."""
    decoder = json.JSONDecoder()
    at = _past_space(text, 0)
    if not text.startswith("[", at):
        yield from _json_lines(path, text.split("\n"))
        return
    line, counted = 1, 0
    separator = "["
    while True:
        if not text.startswith(separator, at):
            raise DataError(f"{path}:{line}: not JSON (expected '{separator}')")
        at = _past_space(text, at + 1)
        if separator == "[" and text.startswith("]", at):
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not JSON ({error})") from None
        yield _entry(path, line, value)
        at = _past_space(text, at)
        if text.startswith("]", at):
            break
        separator = ","
    if _past_space(text, at + 1) != len(text):
        raise DataError(f"{path}: not JSON (something follows the list)")


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _csv(path: Path, file: TextIO) -> Iterator[Entry]:
    """Every value is text. Quoted values may have line breaks."""
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header) or "" in header:
            raise DataError(f"{path}:1: the first line must name the columns, each differently")
        begins = reader.line_num + 1
        for values in reader:
            line, begins = begins, reader.line_num + 1
            if not values:
                continue
            if len(values) != len(header):
                yield Entry(line, DataError(f"{path}:{line}: {len(values)} values for {len(header)} columns"))
            else:
                yield Entry(line, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Entry]:
    try:
        import datasets
        from pyarrow import ArrowException
    except ImportError:
        raise UsageError(
            f"{path}: Parquet needs the library 'datasets'", hint="pip install 'flglm[data]', or write JSON lines"
        ) from None
    if not path.is_file():
        raise DataError(f"{path}: No such file", hint="name a file of rows")
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path.absolute()), split="train", streaming=True)
        for number, record in enumerate(rows, start=1):
            yield Entry(number, record)
    except (ArrowException, ValueError) as error:
        raise DataError(f"{path}: not Parquet ({' '.join(str(error).split())[:200]})") from None


def _entry(path: Path, line: int, value: Any) -> Entry:
    return Entry(line, value if isinstance(value, dict) else DataError(f"{path}:{line}: not a JSON object"))
