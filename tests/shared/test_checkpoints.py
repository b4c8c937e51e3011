"""Checkpoints on disk: whole or not there, and never trusted unread."""

import os
from pathlib import Path

import pytest
import torch

from shared import state_files
from shared.errors import CheckpointError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1], dtype=torch.int64)}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state_files.save(tmp_path, 3, TENSORS, {"steps": 7})
    tensors, facts = state_files.load(tmp_path, 3)
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert facts == {"steps": 7}


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10):
        state_files.save(tmp_path, number, TENSORS, {}, keep=2)
    assert state_files.numbers(tmp_path) == [2, 10]


def test_the_first_is_kept_where_a_job_may_begin_anew(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10, 2):
        state_files.save(tmp_path, number, TENSORS, {}, keep=2, keep_first=True)
    assert state_files.numbers(tmp_path) == [0, 2]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_while_it_is_replaced_the_old_or_the_new_one_is_there(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException): ...

    rename = Path.rename
    done: list[Path] = []

    def some(path: Path, target: Path) -> Path:
        if len(done) == renames:
            raise Killed
        done.append(path)
        return rename(path, target)

    state_files.save(tmp_path, 4, TENSORS, {"of": "old"})
    monkeypatch.setattr(Path, "rename", some)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
    if renames < 2:
        with pytest.raises(Killed):
            state_files.save(tmp_path, 4, TENSORS, {"of": "new"})
    else:
        state_files.save(tmp_path, 4, TENSORS, {"of": "new"})
    monkeypatch.undo()
    loaded: list[object] = []
    unreadable: list[int] = []
    state_files.resume(
        tmp_path, lambda n: loaded.append(state_files.load(tmp_path, n)[1]["of"]), lambda n, _: unreadable.append(n)
    )
    assert (loaded, unreadable) == (["new" if renames == 2 else "old"], [])
    state_files.save(tmp_path, 4, TENSORS, {"of": "third"})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_going_back_drops_the_abandoned_future_and_old_drafts(tmp_path: Path) -> None:
    for number in (5, 6):
        state_files.save(tmp_path, number, TENSORS, {})
    (tmp_path / ".draft-6-99").mkdir()
    state_files.save(tmp_path, 3, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_draft_of_a_killed_process_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".draft-4-99").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert state_files.numbers(tmp_path) == []
    assert state_files.numbers(tmp_path / "absent") == []


@pytest.mark.parametrize("number", [0, 1])
def test_a_disk_that_refuses_leaves_the_old_one(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state_files.save(tmp_path, 0, TENSORS, {"steps": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        state_files.save(tmp_path, number, TENSORS, {"steps": 2})
    assert state_files.numbers(tmp_path) == [0]
    assert state_files.load(tmp_path, 0)[1] == {"steps": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("state.safetensors", b"garbage", "not what was written"),
        ("state.json", b"{", "not a checkpoint"),
        ("state.json", b"[]", "not a checkpoint"),
        ("state.json", b"[" * 100_000, "not a checkpoint"),
        ("state.json", b'{"format": 99}', "format 99"),
    ],
)
def test_a_torn_or_altered_one_is_refused(file: str, content: bytes, said: str, tmp_path: Path) -> None:
    (state_files.save(tmp_path, 0, TENSORS, {}) / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        state_files.load(tmp_path, 0)


def test_an_absent_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        state_files.load(tmp_path, 0)
