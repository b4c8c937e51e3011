"""What a client carries from round to round, where a server cannot say whether its last update counted (replicas)."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny_models import save_tiny_model
from shared.errors import CheckpointError
from shared.job import parse_job
from shared.model.checkpoint import Checkpoint
from worker_client.carried import Carried
from worker_client.head_tail import load_client_parts
from worker_client.progress import Progress
from worker_client.remote_trunk import Boundary

HEARD, MISSED = Carried(unsent={"x": torch.ones(1)}), Carried(unsent={"x": torch.full((1,), 2.0)})


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    """At the start of its second round, the first of which counted."""
    model = str(save_tiny_model("llama", tmp_path / "model"))
    job = parse_job({"model_name_or_path": model, "rounds": {"count": 4}}, "job")
    made = Progress(job, load_client_parts(Checkpoint(model), job), tmp_path / "out", lambda event: None)
    made.resume()
    made.complete_round(0, HEARD, {})
    made.align(1)
    made.settle(Boundary(1, 2, {}))
    assert made.carried == HEARD
    return made


@pytest.mark.parametrize("handed_in", [True, False])
def test_left_behind_it_carries_on_what_it_carried_into_the_round(handed_in: bool, progress: Progress) -> None:
    if handed_in:
        progress.complete_round(1, MISSED, {})
    progress.undo(1)
    progress.align(2)
    progress.settle(Boundary(2, 2, {}, refused="round 2 is at stage training"))
    assert _same(progress.carried, HEARD)


@pytest.mark.parametrize(("answer", "carried"), [({}, MISSED), ({"refused": "NaN"}, HEARD)])
def test_answered_it_knows(answer: dict[str, Any], carried: Carried, progress: Progress) -> None:
    progress.complete_round(1, MISSED, {})
    progress.align(2)
    progress.settle(Boundary(2, 2, {}, **answer))
    assert _same(progress.carried, carried)


def test_who_cannot_go_back_does_not_go_on(progress: Progress) -> None:
    """It would begin the round with what it trained alone."""
    progress.complete_round(1, MISSED, {})
    for folder in progress.out.glob("checkpoint-[01]"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="what round 2 began with"):
        progress.undo(1)


def _same(one: Carried, other: Carried) -> bool:
    return one.unsent.keys() == other.unsent.keys() and all(
        torch.equal(v, other.unsent[n]) for n, v in one.unsent.items()
    )
