"""Plain PyTorch, as the measure of exactness: a whole Hugging Face model, rows one by one, AdamW. No code of ours."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, get_scheduler

from shared.job import Training
from worker_client.data import Row


def load_plain(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def row_logits(model: Any, row: Row) -> Tensor:
    """(n, vocabulary) logits of one row, unpadded; not those of virtual tokens that peft puts before it."""
    logits: Tensor = model(input_ids=torch.tensor([row.input_ids])).logits[0, -len(row.input_ids) :]
    return logits


def mean_loss(model: Any, rows: Sequence[Row]) -> Tensor:
    """Mean cross-entropy over all counted tokens of the rows."""
    logits, targets = [], []
    for row in rows:
        at = [p for p in range(len(row.input_ids) - 1) if row.counts[p + 1]]
        logits.append(row_logits(model, row)[at])
        targets += [row.input_ids[p + 1] for p in at]
    return F.cross_entropy(torch.cat(logits).float(), torch.tensor(targets))


def train_plain(
    model: Any,
    batches: Iterable[Sequence[Row]],
    training: Training,
    steps: int,
    groups: Sequence[Sequence[nn.Parameter]],
) -> list[float]:
    """The loss of each step. One AdamW; each group of parameters is clipped by its own norm."""
    parameters = [p for group in groups for p in group]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
    warmup = math.ceil(training.warmup_ratio * steps)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    model.train()
    losses = []
    for rows in batches:
        loss = mean_loss(model, rows)
        torch.autograd.backward(loss)
        for group in groups:
            if training.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(group, training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
