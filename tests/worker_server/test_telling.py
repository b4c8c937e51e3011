"""What clients are told of the averages, and what the server keeps of them."""

from pathlib import Path
from typing import Any

import torch

from shared.error_feedback import decompress
from shared.job import Job, Wire
from shared.model.checkpoint import Fingerprint
from worker_server.no_trunk import NoTrunk
from worker_server.progress import Progress
from worker_server.telling import tell

START = {"x": torch.tensor([1.0, 2.0, 3.0, 4.0]), "y": torch.tensor([[0.5]])}
AVERAGES = {"x": torch.tensor([1.5, 2.0, 7.0, 4.25]), "y": torch.tensor([[2.5]])}


def test_whole_averages_are_told_as_they_are() -> None:
    told = tell(Wire(), START, AVERAGES, {})
    assert told.values is AVERAGES
    assert told.unsent == {}
    assert told.change is None


def test_the_largest_changes_are_told_and_the_rest_comes_later() -> None:
    wire = Wire(average_density=0.4)  # two of five
    told = tell(wire, START, AVERAGES, {})
    assert told.values["x"].tolist() == [1, 2, 7, 4]
    assert told.values["y"].tolist() == [[2.5]]
    assert told.unsent["x"].tolist() == [0.5, 0, 0, 0.25]
    assert told.change is not None
    shapes = {name: value.shape for name, value in START.items()}
    change = decompress(told.change.pieces, told.change.frames, shapes, 0.4, "float32")
    assert all(torch.equal(START[name] + change[name], told.values[name]) for name in START)
    # Nothing moved since: the rest is told.
    again = tell(wire, told.values, dict(told.values), told.unsent)
    assert all(torch.equal(again.values[name], AVERAGES[name]) for name in AVERAGES)
    assert not any(bool(value.any()) for value in again.unsent.values())


def test_what_a_format_cannot_hold_is_not_told() -> None:
    huge = {"x": torch.full((4,), 3.4e38), "y": torch.tensor([[0.5]])}
    before = {"x": torch.ones(4), "y": torch.zeros(1, 1)}
    told = tell(Wire(average="bfloat16"), {"x": torch.zeros(4), "y": torch.zeros(1, 1)}, huge, before)
    assert not told.values["x"].any()
    assert torch.equal(told.unsent["x"], torch.ones(4))
    assert told.change is None


def test_what_is_untold_is_in_the_checkpoint_and_what_travels_is_not(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model_name_or_path": "m", "split": {"trunk": "client"}, "wire": {"average_density": 0.4}}

    def progress() -> Progress:
        return Progress(tmp_path, Job(**values), Fingerprint("0" * 64, "0" * 64, "0" * 64), NoTrunk())

    first = progress()
    first.begin()
    told = tell(first.job.wire, START, AVERAGES, {})
    first.complete_round(told.values, {}, unsent=told.unsent, change=told.change)
    assert first.change is told.change
    again = progress()
    again.begin()
    assert again.round == 1
    assert all(torch.equal(again.unsent[name], told.unsent[name]) for name in START)
    assert all(torch.equal(again.for_clients()[name], told.values[name]) for name in START)
    assert again.change is None
    first.restore(0)
    assert first.unsent == {}
    assert first.change is None
