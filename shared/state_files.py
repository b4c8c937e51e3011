"""Training checkpoints: tensors and a few facts in one folder, written whole or not at all.

A checkpoint `checkpoint-N` holds `state.safetensors` and `state.json` (facts, and the digest of the tensors' file). It
is written beside its place, flushed to disk and renamed, so that a process killed at any moment leaves the old one or
the new one. Reading checks the digest.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import CheckpointError

TENSORS = "state.safetensors"
FACTS = "state.json"
FORMAT = 1
ASIDE = ".replaced-"
_NAME = re.compile(r"^checkpoint-(\d{1,12})$")


def save(
    folder: Path,
    number: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: int = 2,
    *,
    keep_first: bool = False,
) -> Path:
    """Write `checkpoint-<number>` under `folder`, replacing one of that number; then keep the last `keep` up to it, and
    with `keep_first` the oldest.

    Later ones belong to a future that was abandoned, drafts to processes that were killed: both go. Raises
    CheckpointError if the disk refuses; what was there before is still there then.
    """
    target = path_of(folder, number)
    draft = folder / f".draft-{number}-{os.getpid()}"
    try:
        with writing(target):
            _write(draft, target, number, tensors, facts)
    except CheckpointError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    past = [other for other in numbers(folder) if other <= number]
    for other in set(numbers(folder)) - {*past[-keep:], *(past[:1] if keep_first else ())}:
        shutil.rmtree(path_of(folder, other), ignore_errors=True)
    return target


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises CheckpointError, which says what to do, if the disk refuses what is written inside."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: cannot be written ({reason})", hint="make room on that disk, then run the same command to resume"
        ) from None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a small file, flushed to disk, whole or not at all. Raises CheckpointError if the disk refuses."""
    draft = path.with_name(f".{path.name}.draft")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(document))
        _flush(draft)
        draft.replace(path)
        _flush(path.parent)


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises CheckpointError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None


def path_of(folder: Path, number: int) -> Path:
    return folder / f"checkpoint-{number}"


def numbers(folder: Path) -> list[int]:
    """The numbers of the checkpoints under `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := _NAME.match(path.name)))


def load(folder: Path, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of `checkpoint-<number>`. Raises CheckpointError if it is absent, torn or altered."""
    path = path_of(folder, number)
    try:
        document = json.loads((path / FACTS).read_text())
        digest = _digest(path / TENSORS)
        if document["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {document['format']}, this version reads {FORMAT}")
        if digest != document["tensors_sha256"]:
            raise CheckpointError(
                f"{path}: {TENSORS} is not what was written", hint=f"remove {path} to use an older one"
            )
        return load_file(path / TENSORS), dict(document["facts"])
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a checkpoint ({type(error).__name__})") from None


def resume(folder: Path, load: Callable[[int], None], unreadable: Callable[[int, CheckpointError], None]) -> bool:
    """Call `load` with the newest number that it takes, after telling `unreadable` of newer ones that raised
    CheckpointError. False if there are no checkpoints; raises the oldest's error if it takes none, and CheckpointError
    if the disk refuses to put one back in its place.
    """
    with writing(folder):
        _put_back(folder)
    available = numbers(folder)
    for number in reversed(available):
        try:
            load(number)
        except CheckpointError as error:
            if number == available[0]:
                raise
            unreadable(number, error)
        else:
            return True
    return False


def _write(draft: Path, target: Path, number: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    _put_back(folder)
    for left_over in folder.glob(".draft-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    draft.mkdir()
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, draft / TENSORS)
    digest = _digest(draft / TENSORS)
    document = {"format": FORMAT, "number": number, "tensors_sha256": digest, "facts": dict(facts)}
    (draft / FACTS).write_text(json.dumps(document, indent=1, sort_keys=True))
    for name in (TENSORS, FACTS):
        _flush(draft / name)
    _flush(draft)
    aside = folder / f"{ASIDE}{number}"
    if target.exists():
        target.rename(aside)
    draft.rename(target)
    _flush(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Whoever was killed between two renames left the old checkpoint aside, and its place empty."""
    for aside in folder.glob(f"{ASIDE}*"):
        place = path_of(folder, int(aside.name.removeprefix(ASIDE)))
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(place)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
