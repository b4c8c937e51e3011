"""The figures of a long run, a JSON file a cell: a run that was stopped goes on where it was."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import UsageError

Figures = dict[str, Any]
SETTINGS = "settings.json"


class Cells:
    """The folder of one run's cells. `settings`: what must be the same for its cells to be comparable.

    Raises UsageError if there are cells of other settings in the folder.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        mine = json.loads(json.dumps(settings))
        kept = folder / SETTINGS
        if kept.exists() and (theirs := json.loads(kept.read_text())) != mine:
            different = ", ".join(sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key)))
            raise UsageError(f"{folder} holds figures of other settings ({different})", hint="name another --out")
        _write(kept, mine)

    def figures(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """Those of the cell: read if it was measured before, else measured and written. Says so on standard error."""
        path = self.folder / f"{_file_name(name)}.json"
        if path.exists():
            kept: Figures = json.loads(path.read_text())
            return kept
        began = time.monotonic()
        measured = measure()
        _write(path, measured)
        print(f"{name} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        return measured


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)


def _write(path: Path, values: Any) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(values, indent=1) + "\n")
    draft.replace(path)
