"""Head and tail around no trunk at all: loss and score against plain cross-entropy, and what of them is trained."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.tiny_models import save_tiny_model
from shared.job import Full, Job, Lora, TrainedPart, Training
from shared.model.checkpoint import Checkpoint
from worker_client.batches import pack_rows
from worker_client.data import Row
from worker_client.head_tail import NO_SCORE, HeadTail, Score, load_client_parts, score_logits

ROWS = [Row((5, 6, 7), (False, False, True)), Row((8, 9, 10), (True, True, True))]


def parts(tmp_path: Path, method: Full | Lora, *trained: TrainedPart) -> HeadTail:
    model = save_tiny_model("llama", tmp_path / "model")
    job = Job(model_name_or_path=str(model), method=method, training=Training(parts=trained))
    return load_client_parts(Checkpoint(str(model)), job)


def test_a_row_is_right_when_all_its_targets_are() -> None:
    batch = pack_rows(ROWS)
    assert batch.targets.tolist() == [7, 9, 10]
    logits = torch.zeros(3, 20)
    logits[[0, 1, 2], [7, 9, 11]] = 5.0
    score = score_logits(logits, batch)
    expected = F.cross_entropy(logits, batch.targets, reduction="sum").item()
    assert (score.tokens, score.rows, score.right_rows) == (3, 2, 1)
    assert score.loss == pytest.approx(expected / 3)
    assert score.accuracy == 0.5


def test_scores_add_up_by_token_and_row() -> None:
    total = NO_SCORE + Score(6.0, 3, 1, 1) + Score(1.0, 4, 3, 0)
    assert total == Score(7.0, 7, 4, 1)
    assert (total.loss, total.accuracy) == (1.0, 0.25)
    assert (NO_SCORE.loss, NO_SCORE.accuracy) == (0.0, 0.0)


def test_the_loss_is_the_mean_over_the_tokens_that_count(tmp_path: Path) -> None:
    made = parts(tmp_path, Full(), "head", "trunk", "tail")
    batch = pack_rows(ROWS)
    hidden = made.hidden(batch)
    assert hidden.shape == (6, 32)
    logits = made.tail.logits(hidden, batch.lengths, torch.arange(6))
    expected = F.cross_entropy(logits[[1, 3, 4]], torch.tensor([7, 9, 10]))
    torch.testing.assert_close(made.loss(hidden, batch), expected)
    assert made.score(hidden, batch).loss == pytest.approx(expected.item())


def test_what_is_trained_is_what_the_job_names(tmp_path: Path) -> None:
    both = parts(tmp_path, Lora(), "head", "trunk", "tail")
    assert both.head_is_trained
    assert {name.split(".")[2] for name in both.parameters} == {"0", "3"}
    assert all(".lora_" in name for name in both.parameters)

    tail = parts(tmp_path, Lora(), "trunk", "tail")
    assert not tail.head_is_trained
    assert {name.split(".")[2] for name in tail.parameters} == {"3"}

    none = parts(tmp_path, Full(), "trunk")
    assert not none.head_is_trained
    assert none.parameters == {}


def test_dropout_is_for_training_alone(tmp_path: Path) -> None:
    made = parts(tmp_path, Lora(lora_dropout=0.9), "head", "tail")
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.normal_()
    batch = pack_rows(ROWS)
    made.train_mode(True)
    assert not torch.equal(made.hidden(batch), made.hidden(batch))
    made.train_mode(False)
    assert torch.equal(made.hidden(batch), made.hidden(batch))
