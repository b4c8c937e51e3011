"""A whole model in this process, as head, trunk and tail with nothing between them: a checkpoint, or what a job made of
it. The same parts and weights as in a job; what crosses there in int8 or bfloat16 is not rounded here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import state_files
from shared.errors import CheckpointError, JobError, ModelError, UsageError
from shared.job import Job
from shared.model.carve import TRUNK_DTYPES, Part, load_head_and_tail, load_part
from shared.model.checkpoint import Checkpoint, checkpoint_of
from shared.model.families import context_length
from shared.model.plan import SplitPlan
from shared.model.residuals import Residuals
from shared.model.trainable import load_trained, make_trainable, trained
from shared.payload.messages import RESIDUAL
from shared.prefixes import under
from worker_client.batches import Batch, with_virtual_tokens
from worker_client.client import load_tokenizer
from worker_client.evaluation.client_state import job_of, result_in
from worker_client.head_tail import trainable_parts


@dataclass(frozen=True)
class Trained:
    """What a job left: a client's `--out`, and the server's `--state` where the trunk was trained."""

    result: Path
    server_state: Path | None


@dataclass(frozen=True)
class LocalModel:
    """The three parts, on `device`. `context`: the most tokens of a row, beside `prompt_tokens` virtual ones."""

    head: Part
    trunk: Part
    tail: Part
    tokenizer: Any
    context: int
    device: str
    prompt_tokens: int = 0

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Float32 logits (P, vocabulary) on the CPU at the batch's positions `at`."""
        batch = with_virtual_tokens(batch, self.prompt_tokens)
        hidden = self.head.embed(batch.input_ids.to(self.device), batch.lengths)
        hidden = self.trunk.forward(hidden.to(self.trunk.dtype), batch.lengths).to(self.tail.dtype)
        return self.tail.logits(hidden, batch.lengths, batch.at.to(self.device)).float().cpu()

    def continued(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The whole row is computed for each token: no cache."""
        ids = list(prompt)
        nothing = torch.empty(0, dtype=torch.int64)
        for _ in range(max_new_tokens):
            row = Batch(torch.tensor(ids), (len(ids),), torch.tensor([len(ids) - 1]), nothing, nothing)
            token = int(self.logits(row)[0].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            ids.append(token)
        return ids[len(prompt) :]


def load_local_model(name_or_path: str, *, device: str = "cpu", trained_by: Trained | None = None) -> LocalModel:
    """From a folder or hub id. Raises ModelError, UsageError, CheckpointError."""
    _check_device(device)
    job = None if trained_by is None else job_of(trained_by.result)
    checkpoint = Checkpoint(name_or_path) if job is None else checkpoint_of(job, name_or_path)
    try:
        split = (1, 1) if job is None else (job.split.head_blocks, job.split.tail_blocks)
        plan = SplitPlan(*split, checkpoint.config.num_hidden_layers)
    except JobError:
        raise ModelError(f"{name_or_path}: {checkpoint.config.num_hidden_layers} blocks cannot be split") from None
    head, tail = load_head_and_tail(checkpoint, plan, device=device)
    dtype = torch.float32 if job is None else TRUNK_DTYPES[job.training.trunk_dtype]
    trunk = load_part(checkpoint, plan, "trunk", dtype=dtype, device=device)
    context, prompt_tokens = context_length(checkpoint.config), 0
    if job is not None and trained_by is not None:
        context, prompt_tokens = context - job.prefix_tokens - job.prompt_tokens, job.prompt_tokens
        _take_trained(head, trunk, tail, trained_by, job, checkpoint)
    for part in (head, trunk, tail):
        part.module.requires_grad_(False).to(device).eval()
    return LocalModel(head, trunk, tail, load_tokenizer(checkpoint), context, device, prompt_tokens)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device", hint="--device cpu") from None
    # torch keeps the index in eight bits: 999 is -25.
    if device.type != "cpu" and not (device.type == "cuda" and 0 <= (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(f"--device {name}: there is none here", hint="--device cpu")


def _take_trained(head: Part, trunk: Part, tail: Part, trained_by: Trained, job: Job, checkpoint: Checkpoint) -> None:
    at_client = "trunk" in job.client_parts
    parts = trainable_parts(head, tail, trunk if at_client else None, job)
    result_in(trained_by.result).put_into(parts)
    if not at_client:
        make_trainable(trunk, job)
        if "trunk" in job.training.parts:
            _take_trunk(trunk, trained_by, job, checkpoint)


def _take_trunk(trunk: Part, trained_by: Trained, job: Job, checkpoint: Checkpoint) -> None:
    """The trunk's trained tensors after the last round, and what was added to its frozen weights."""
    state, folder = _server_state(trained_by, job, checkpoint)
    values, parameters = under("trunk/", state), trained([trunk])
    if {name: p.shape for name, p in parameters.items()} != {name: value.shape for name, value in values.items()}:
        raise CheckpointError(f"{folder}: its tensors are not those that the job trains in this model")
    load_trained(parameters, values)
    residuals = Residuals([trunk], job)
    residuals.apply({n: value for n, value in under(f"aggregator/{RESIDUAL}", state).items() if n in residuals.layers})


def _server_state(trained_by: Trained, job: Job, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Path]:
    folder = trained_by.server_state
    if folder is None:
        raise UsageError(
            f"{trained_by.result}: the job trained the trunk too, and that is at the server",
            hint="--server-state: the server's --state folder, where both are at hand; or --invite, while it runs",
        )
    numbers = state_files.numbers(folder)
    if not numbers:
        raise CheckpointError(f"{folder}: no checkpoint", hint="name the server's --state folder")
    if numbers[-1] != job.rounds.count:
        raise CheckpointError(f"{folder}: the newest checkpoint is of round {numbers[-1]} of {job.rounds.count}")
    tensors, facts = state_files.load(folder, numbers[-1])
    if facts.get("job") != job.digest().hex():
        raise CheckpointError(f"{folder}: belongs to another job than {trained_by.result}")
    if facts.get("model") != vars(checkpoint.fingerprint()):
        raise CheckpointError(f"{folder}: belongs to another model than {checkpoint.name_or_path}")
    return tensors, folder
