"""The client's two parts around the trunk: hidden states out of the head, loss and scores out of the tail."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.job import Job
from shared.model.carve import TRUNK_DTYPES, Part, load_head_and_tail, load_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.residuals import Residuals
from shared.model.trainable import handed_in, make_trainable, trained
from worker_client.batches import Batch


@dataclass(frozen=True)
class Score:
    """Over the target tokens of some rows: summed loss, tokens, rows, and rows whose every target is the argmax."""

    loss_sum: float
    tokens: int
    rows: int
    right_rows: int

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.loss_sum + other.loss_sum,
            self.tokens + other.tokens,
            self.rows + other.rows,
            self.right_rows + other.right_rows,
        )

    @property
    def loss(self) -> float:
        """Mean loss per target token, in nats."""
        return self.loss_sum / max(1, self.tokens)

    @property
    def accuracy(self) -> float:
        return self.right_rows / max(1, self.rows)


NO_SCORE = Score(0.0, 0, 0, 0)


@dataclass(frozen=True)
class HeadTail:
    """Head and tail with their trained parameters by global name; in plain FedAvg the trunk with its, too.

    `shared`: those of them that are handed in and averaged; the others are personal, and stay. `residuals` may be added
    to frozen weights.
    """

    head: Part
    tail: Part
    parameters: dict[str, nn.Parameter]
    shared: dict[str, nn.Parameter]
    residuals: Residuals
    trunk: Part | None = None

    @property
    def head_is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.head.module.parameters())

    def train_mode(self, on: bool) -> None:
        self.head.module.train(on)
        self.tail.module.train(on)
        if self.trunk is not None:
            self.trunk.module.train(on)

    def version(self) -> dict[str, Tensor]:
        """A copy of the head's trained parameters, leaves by their names in its base model."""
        return {n: p.detach().clone().requires_grad_() for n, p in self._head_parameters().items()}

    def take(self, version: Mapping[str, Tensor]) -> None:
        """Hand the gradients of a version's leaves to the parameters."""
        for name, parameter in self._head_parameters().items():
            gradient = version[name].grad
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _head_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.head.base.named_parameters() if p.requires_grad}

    def hidden(self, batch: Batch, version: Mapping[str, Tensor] | None = None) -> Tensor:
        """The head's output, (T, d); with the parameters of `version`, or the latest."""
        return self.head.embed(batch.input_ids, batch.lengths, version)

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch's target tokens, from the trunk's output (T, d)."""
        logits = self.tail.logits(hidden, batch.lengths, batch.at)
        return F.cross_entropy(logits.float(), batch.targets)

    @torch.no_grad()
    def score(self, hidden: Tensor, batch: Batch) -> Score:
        logits = self.tail.logits(hidden, batch.lengths, batch.at).float()
        return score_logits(logits, batch)


def score_logits(logits: Tensor, batch: Batch) -> Score:
    """logits (P, vocabulary) at the batch's target positions."""
    loss = F.cross_entropy(logits, batch.targets, reduction="sum")
    wrong = torch.zeros(len(batch.lengths), dtype=torch.int64)
    wrong.index_add_(0, batch.row, (logits.argmax(-1) != batch.targets).long())
    return Score(float(loss), batch.target_tokens, len(batch.lengths), int((wrong == 0).sum()))


def load_client_parts(checkpoint: Checkpoint, job: Job) -> HeadTail:
    """The client's parts from the checkpoint, made trainable as the job says. Raises ModelError, JobError."""
    plan = SplitPlan(job.split.head_blocks, job.split.tail_blocks, checkpoint.config.num_hidden_layers)
    head, tail = load_head_and_tail(checkpoint, plan)
    trunk = None
    if "trunk" in job.client_parts:
        trunk = load_part(checkpoint, plan, "trunk", dtype=TRUNK_DTYPES[job.training.trunk_dtype])
    return trainable_parts(head, tail, trunk, job)


def trainable_parts(head: Part, tail: Part, trunk: Part | None, job: Job) -> HeadTail:
    """These parts, changed in place, with what the job trains in them; the trunk where clients hold it.

    Raises JobError.
    """
    parts = [part for part in (head, trunk, tail) if part is not None]
    for part in parts:
        make_trainable(part, job)
    averaged = [part for part in parts if part.name not in job.aggregation.personal]
    return HeadTail(head, tail, trained(parts), handed_in(parts, job), Residuals(averaged, job), trunk)
