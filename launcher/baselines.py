"""What the joint run is compared with: the same model trained whole, in one process, with plain transformers and peft.

Each hospital alone, and one run on the pooled rows: every step takes the rows that the clients would take in it, and
trains what the job trains of the model. Gradients are clipped by the norm of all that is trained, as in one process,
not party by party. Rows are padded, as people do; none of the splitting or packing code computes anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from launcher.whole_models import drawn_whole, with_method
from shared.job import Job
from shared.model.families import family_of
from shared.model.optimizer import PartOptimizer
from worker_client.batches import Batch, batch_indices, pack_rows
from worker_client.data import Row
from worker_client.head_tail import NO_SCORE, Score, score_logits


@dataclass(frozen=True)
class Baseline:
    """Loss by step, and the score on each client's validation rows."""

    losses: list[float]
    scores: dict[str, Score]


def train_whole(
    job: Job,
    train: Mapping[str, Sequence[Row]],
    validation: Mapping[str, Sequence[Row]],
    *,
    threads: int,
    report: Callable[[int], None] | None = None,
) -> Baseline:
    """Train the whole model on all rows of `train` together; score it on each set of `validation`."""
    model, losses = fit_whole(job, train, threads=threads, report=report)
    size = job.training.per_device_train_batch_size
    return Baseline(losses, {name: score_whole(model, rows, size) for name, rows in validation.items()})


def fit_whole(
    job: Job,
    train: Mapping[str, Sequence[Row]],
    *,
    threads: int,
    device: str = "cpu",
    report: Callable[[int], None] | None = None,
) -> tuple[nn.Module, list[float]]:
    """The whole model after training on all rows of `train` together, in evaluation mode; and the loss of each step."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    torch.manual_seed(job.training.seed)
    model: nn.Module = load_whole(job).to(device)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = PartOptimizer(trainable, job.training, job.total_steps)
    losses: list[float] = []
    model.train()
    for step in range(job.total_steps):
        losses.append(_accumulate(model, _micro_batches(job, train, step)))
        optimizer.step()
        if report is not None:
            report(step + 1)
    return model.eval(), losses


def _micro_batches(job: Job, train: Mapping[str, Sequence[Row]], step: int) -> list[Batch]:
    """What all clients would take in this step (from 0): of each of its micro-batches the rows of all, as one batch."""
    count = job.training.gradient_accumulation_steps
    size, seed = job.training.per_device_train_batch_size, job.training.seed
    return [
        pack_rows([rows[i] for _, rows in sorted(train.items()) for i in batch_indices(len(rows), size, number, seed)])
        for number in range(step * count, (step + 1) * count)
    ]


def _accumulate(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss of all target tokens of the batches, whose gradient is added to the parameters'."""
    total, tokens = 0.0, sum(batch.target_tokens for batch in batches)
    for batch in batches:
        logits = padded_logits(model, batch).float()
        loss = F.cross_entropy(logits, batch.targets.to(logits.device)) * (batch.target_tokens / tokens)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total


def load_whole(job: Job) -> Any:
    """The whole model, trainable as the job says, from where the split model starts."""
    if job.training.from_scratch:
        model = drawn_whole(job)
    else:
        model = AutoModelForCausalLM.from_pretrained(job.model_name_or_path, dtype=torch.float32)
    return with_method(model, job, family_of(model.config))[0]


def padded_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (P, vocabulary) at the batch's target positions, the rows right-padded and masked; where the model is."""
    lengths = torch.tensor(batch.lengths)
    longest = int(lengths.max())
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.arange(longest) < lengths[:, None]
    ids[mask] = batch.input_ids
    device = next(model.parameters()).device
    hidden_at = torch.nonzero(mask.flatten()).flatten()[batch.at].to(device)
    # Before them come those of virtual tokens, where there are any.
    logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits[:, -longest:]
    return logits.flatten(0, 1)[hidden_at]


@torch.no_grad()
def score_whole(model: nn.Module, rows: Sequence[Row], size: int) -> Score:
    score = NO_SCORE
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        batch = pack_rows(chosen)
        score += score_logits(padded_logits(model, batch).float().cpu(), batch)
    return score
