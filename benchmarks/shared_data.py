"""Public data and weights for benchmarks, in a folder `shared/data` beside the checkout. Nothing of it is ours."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_file(name: str) -> Path:
    """The path `name` under the folder. If it is absent, the benchmark ends with a message and exit code 0."""
    path = FOLDER / name
    if not path.exists():
        print(f"skipped: there is no shared/data/{name} beside the checkout", file=sys.stderr)
        raise SystemExit(0)
    return path
