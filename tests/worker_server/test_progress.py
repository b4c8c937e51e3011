"""What the server keeps between rounds: it goes on where it was, and believes no checkpoint that it did not write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_models import save_tiny_model
from shared import state_files
from shared.errors import CheckpointError
from shared.job import Data, Job
from shared.model.carve import load_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable
from worker_server.kept import Rows
from worker_server.progress import Progress
from worker_server.trunk import Trunk


def step(trunk: Trunk, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Backward and optimizer step."""
    results = trunk.backward(0, gradients)
    trunk.step()
    return results


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def progress_of(model: Path, state: Path, **settings: Any) -> Progress:
    job = Job(model_name_or_path=str(model), **settings)
    part = load_part(Checkpoint(str(model)), SplitPlan(1, 1, 4), "trunk")
    make_trainable(part, job)
    return Progress(state, job, Checkpoint(str(model)).fingerprint(), Trunk(part, job))


def train(progress: Progress) -> None:
    rows = Rows(torch.randn(6, 32), (4, 2), 4, True)
    assert isinstance(progress.trunk, Trunk)
    progress.trunk.forward(0, [rows])
    step(progress.trunk, [torch.randn(6, 32)])


def corrupt(state: Path, number: int) -> None:
    (state / f"checkpoint-{number}" / state_files.TENSORS).write_bytes(b"torn")


def test_the_first_start_keeps_its_beginning(model: Path, tmp_path: Path) -> None:
    progress = progress_of(model, tmp_path / "state")
    progress.begin()
    assert progress.round == 0
    assert state_files.numbers(tmp_path / "state") == [0]


def test_it_goes_on_at_the_last_round(model: Path, tmp_path: Path) -> None:
    first = progress_of(model, tmp_path / "state")
    first.begin()
    train(first)
    first.complete_round({"x": torch.ones(2)})
    again = progress_of(model, tmp_path / "state")
    again.begin()
    assert (again.round, again.trunk.steps) == (1, 1)
    assert again.averages is not None
    assert torch.equal(again.averages["x"], torch.ones(2))
    expected = first.trunk.state()
    assert all(torch.equal(value, expected[name]) for name, value in again.trunk.state().items())


def test_the_aggregators_state_is_kept_with_its_round(model: Path, tmp_path: Path) -> None:
    first = progress_of(model, tmp_path / "state")
    first.begin()
    first.complete_round({"x": torch.ones(2)}, {"m/x": torch.full((2,), 0.5)})
    first.complete_round({"x": torch.ones(2)}, {"m/x": torch.full((2,), 0.25)})
    again = progress_of(model, tmp_path / "state")
    again.begin()
    assert torch.equal(again.aggregator["m/x"], torch.full((2,), 0.25))
    again.restore(1)
    assert torch.equal(again.aggregator["m/x"], torch.full((2,), 0.5))
    assert again.aggregator.keys() == {"m/x"}


def test_whose_updates_counted_is_kept_with_its_round(model: Path, tmp_path: Path) -> None:
    first = progress_of(model, tmp_path / "state")
    first.begin()
    first.complete_round({}, counted=["a", "b"])
    first.complete_round({}, counted=["b"])
    again = progress_of(model, tmp_path / "state")
    again.begin()
    assert again.counted == {"a": 1, "b": 2}
    again.restore(1)
    assert again.counted == {"a": 1, "b": 1}


def test_before_the_first_round_all_start_from_what_the_job_begins_with(model: Path, tmp_path: Path) -> None:
    progress = progress_of(model, tmp_path / "state")
    progress.initial = lambda: {"x": torch.full((2,), 7.0)}
    progress.begin()
    assert torch.equal(progress.start()["x"], torch.full((2,), 7.0))
    progress.complete_round({"x": torch.zeros(2)})
    assert torch.equal(progress.start()["x"], torch.zeros(2))


def test_a_round_is_undone_to_its_very_beginning(model: Path, tmp_path: Path) -> None:
    progress = progress_of(model, tmp_path / "state")
    progress.begin()
    train(progress)
    progress.complete_round({"x": torch.zeros(1)})
    before = {name: value.clone() for name, value in progress.trunk.state().items()}
    train(progress)
    assert any(not torch.equal(value, before[name]) for name, value in progress.trunk.state().items())
    progress.restore(1)
    assert all(torch.equal(value, before[name]) for name, value in progress.trunk.state().items())
    assert progress.trunk.steps == 1


def test_a_corrupt_last_checkpoint_gives_way_to_the_one_before(model: Path, tmp_path: Path) -> None:
    first = progress_of(model, tmp_path / "state")
    first.begin()
    first.complete_round({})
    corrupt(tmp_path / "state", 1)
    again = progress_of(model, tmp_path / "state")
    again.begin()
    assert again.round == 0
    again.complete_round({})
    progress_of(model, tmp_path / "state").restore(1)


def test_if_none_is_readable_it_does_not_begin_anew(model: Path, tmp_path: Path) -> None:
    first = progress_of(model, tmp_path / "state")
    first.begin()
    first.complete_round({})
    corrupt(tmp_path / "state", 0)
    corrupt(tmp_path / "state", 1)
    with pytest.raises(CheckpointError, match="not what was written"):
        progress_of(model, tmp_path / "state").begin()
    assert state_files.numbers(tmp_path / "state") == [0, 1]


def test_checkpoints_of_another_job_or_model_are_refused(model: Path, tmp_path: Path) -> None:
    progress_of(model, tmp_path / "state").begin()
    with pytest.raises(CheckpointError, match="another job"):
        progress_of(model, tmp_path / "state", data=Data(max_length=21)).begin()
    changed = progress_of(model, tmp_path / "state")
    changed.fingerprint = Checkpoint(str(save_tiny_model("llama", tmp_path / "other", seed=1))).fingerprint()
    with pytest.raises(CheckpointError, match="another model"):
        changed.begin()


def test_under_central_privacy_no_older_round_is_gone_back_to(model: Path, tmp_path: Path) -> None:
    """Its result was told: another noise on the same updates would cost the clients twice."""
    settings = {
        "training": {"parts": ["head"]},
        "rounds": {"weighting": "clients"},
        "privacy": {"type": "central", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5},
    }
    progress = progress_of(model, tmp_path / "state", **settings)
    progress.begin()
    progress.complete_round({"x": torch.zeros(2)})
    progress_of(model, tmp_path / "state", **settings).begin()
    corrupt(tmp_path / "state", 1)
    with pytest.raises(CheckpointError, match="no older one is gone back to") as error:
        progress_of(model, tmp_path / "state", **settings).begin()
    assert "checkpoint-1" in str(error.value.hint)
