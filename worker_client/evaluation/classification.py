"""SST-2 and AG News, from the files in which they are usually handed round."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import DataError
from worker_client.evaluation.cases import Case
from worker_client.evaluation.records import label_in, text_in


def sst2_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines "0 sentence" or "1 sentence". Raises DataError."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                label, _, sentence = line.strip().partition(" ")
                if label:
                    yield number, {"label": label, "sentence": sentence}
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def sst2(record: dict[str, Any]) -> Iterator[Case]:
    yield Case({"sentence": text_in(record, "sentence")}, (label_in(record, {"0": "0", "1": "1"}),))


def agnews(record: dict[str, Any]) -> Iterator[Case]:
    """CSV with the columns Class Index (1 to 4), Title, Description."""
    label = label_in({"label": text_in(record, "Class Index")}, {name: name for name in "1234"})
    yield Case({"title": text_in(record, "Title"), "description": text_in(record, "Description")}, (label,))
