"""What a joint run is compared with: it trains what the job says, on the rows of each step, as plain PyTorch does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fidelity import of_step, random_rows
from benchmarks.plain import load_plain, mean_loss, train_plain
from benchmarks.tiny_models import save_tiny_model
from launcher.baselines import fit_whole, load_whole, train_whole
from launcher.in_process import Site, train_in_process, trunk_tensors
from shared.errors import JobError
from shared.job import Job, parse_job
from shared.model.carve import load_head_and_tail, load_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable, trained
from worker_client.data import Row

STEPS = 3
LORA = {"type": "lora", "r": 2}
ROWS = {name: random_rows(9, seed) for seed, name in enumerate(("a", "b", "c"))}


def job_of(model: Path, **settings: Any) -> Job:
    """Steps of two micro-batches; a block in the tail, two in the head."""
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "seed": 3}
    values = {
        "model_name_or_path": str(model),
        "split": {"head_blocks": 2, "tail_blocks": 1},
        "method": {"type": "full"},
        "rounds": {"count": 1, "local_steps": STEPS},
        "cohort": {"clients": len(ROWS)},
        **settings,
    }
    return parse_job({**values, "training": training | settings.get("training", {})}, "job")


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def split_names(job: Job) -> set[str]:
    """What the real parts train."""
    checkpoint = Checkpoint(job.model_name_or_path)
    plan = SplitPlan(job.split.head_blocks, job.split.tail_blocks, checkpoint.config.num_hidden_layers)
    head, tail = load_head_and_tail(checkpoint, plan)
    parts = [head, load_part(checkpoint, plan, "trunk"), tail]
    for part in parts:
        make_trainable(part, job)
    return set(trained(parts))


PARTS = [("head",), ("trunk",), ("tail",), ("head", "tail"), ("head", "trunk", "tail")]


@pytest.mark.parametrize("method", [LORA, {"type": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_the_whole_model_trains_what_the_parts_train(
    family: str, tied: bool, parts: Any, method: Any, tmp_path: Path
) -> None:
    job = job_of(save_tiny_model(family, tmp_path, tied=tied), method=method, training={"parts": parts})
    assert trained_names(load_whole(job)) == split_names(job)


def test_which_blocks_are_trained_follows_the_split(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)

    def blocks(parts: tuple[str, ...]) -> set[str]:
        return {
            name.split(".")[2]
            for name in trained_names(load_whole(job_of(model, method=LORA, training={"parts": parts})))
        }

    assert (blocks(("head",)), blocks(("trunk",)), blocks(("tail",))) == ({"0", "1"}, {"2"}, {"3"})


def test_a_that_is_frozen_is_not_trained(tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path), method=LORA, aggregation={"type": "fedavg", "lora": "freeze_a"})
    names = trained_names(load_whole(job))
    assert names == split_names(job)
    assert {name.split(".")[-3] for name in names} == {"lora_B"}


def test_prefixes_in_some_layers_alone_are_nothing_to_compare_with(tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path), method={"type": "prefix"}, training={"parts": ["trunk"]})
    with pytest.raises(JobError, match=r"name all of training\.parts"):
        load_whole(job)


def pooled(job: Job) -> list[list[Row]]:
    """All clients' rows of each step."""
    return [[row for _, mine in sorted(ROWS.items()) for row in of_step(job, mine, step)] for step in range(STEPS)]


# A larger epsilon: with AdamW's own, gradients of rounding's size make steps of any.
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.01, "adam_epsilon": 1e-4}


@pytest.mark.parametrize("training", [ADAMW, {"optim": "sgd"}], ids=["adamw", "sgd"])
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_two_micro_batches_are_plain_pytorchs_step_on_all_rows(parts: Any, training: Any, tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path), training={"parts": parts, **training})
    reported: list[int] = []
    model, losses = fit_whole(job, ROWS, threads=1, report=reported.append)
    plain = load_plain(job.model_name_or_path)
    names = split_names(job)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in names)
    expected = plain_losses(plain, job)
    assert reported == [1, 2, 3]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    compare(dict(model.named_parameters()), dict(plain.named_parameters()))
    before = dict(load_plain(job.model_name_or_path).named_parameters())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == names


def plain_losses(plain: Any, job: Job) -> list[float]:
    trainable = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    if job.training.optim == "adamw_torch":
        return train_plain(plain, pooled(job), job.training, STEPS, [trainable])
    losses = []
    for step, rows in enumerate(pooled(job)):
        loss = mean_loss(plain, rows)
        gradients = torch.autograd.grad(loss, trainable)
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        rate = job.training.learning_rate * (1 - step / STEPS) * min(1.0, 1.0 / (norm + 1e-6))
        with torch.no_grad():
            for parameter, gradient in zip(trainable, gradients, strict=True):
                parameter -= rate * gradient
        losses.append(float(loss.detach()))
    return losses


def compare(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value.detach(), expected[name].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [LORA, {"type": "full"}], ids=["lora", "full"])
def test_the_pooled_run_is_the_joint_lockstep_run(method: Any, tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path / "model"), method=method, training={"parts": ["trunk"]})
    train_in_process(job, {name: Site(rows) for name, rows in ROWS.items()}, tmp_path / "split")
    joint: dict[str, Tensor] = trunk_tensors(tmp_path / "split")
    model, _ = fit_whole(job, ROWS, threads=1)
    compare(joint, {name: p for name, p in model.named_parameters() if p.requires_grad})


def test_a_baseline_has_a_loss_a_step_and_a_score_a_client(tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path), training={"parts": ["head", "tail"]})
    held_out = {"a": random_rows(3, 7), "b": random_rows(2, 8)}
    baseline = train_whole(job, {"a": ROWS["a"]}, held_out, threads=1)
    model, losses = fit_whole(job, {"a": ROWS["a"]}, threads=1)
    assert baseline.losses == losses
    for name, rows in held_out.items():
        with torch.no_grad():
            expected = float(mean_loss(model, rows))
        score = baseline.scores[name]
        assert score.loss == pytest.approx(expected, rel=1e-5)
        assert (score.rows, score.tokens) == (len(rows), sum(row.target_tokens for row in rows))
