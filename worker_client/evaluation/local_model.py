"""A whole model in this process, as head, trunk and tail with nothing between them: a checkpoint, or what a job made of
it. The same parts and weights as in a job; what crosses there in int8 or bfloat16 is not rounded here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared import state_files
from shared.errors import CheckpointError, JobError, ModelError, UsageError
from shared.job import Job, parse_job
from shared.model.carve import Part, load_head_and_tail, load_part
from shared.model.checkpoint import Checkpoint
from shared.model.families import context_length
from shared.model.plan import SplitPlan
from shared.model.trainable import load_trained, make_trainable, trained
from worker_client.batches import Batch
from worker_client.client import RESULT, load_tokenizer

TRAINED = "trained.safetensors"
# Methods whose trained tensors are in the modules, so that a forward is all there is to do.
METHODS = ("lora", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    """What a job left: a client's `--out`, and the server's `--state` where the trunk was trained."""

    result: Path
    server_state: Path | None


@dataclass(frozen=True)
class LocalModel:
    """The three parts, on `device`. `context`: the most tokens of a row."""

    head: Part
    trunk: Part
    tail: Part
    tokenizer: Any
    context: int
    device: str

    def logits(self, batch: Batch) -> Tensor:
        """Float32 logits (P, vocabulary) on the CPU at the batch's positions `at`."""
        return self.logits_at(batch.input_ids, batch.lengths, batch.at)

    @torch.inference_mode()
    def logits_at(self, input_ids: Tensor, lengths: Sequence[int], at: Tensor) -> Tensor:
        """input_ids (T,) int64, rows end to end; float32 logits (P, vocabulary) on the CPU at positions `at`."""
        hidden = self.head.embed(input_ids.to(self.device), lengths)
        hidden = self.trunk.forward(hidden.to(self.trunk.dtype), lengths).to(self.tail.dtype)
        return self.tail.logits(hidden, lengths, at.to(self.device)).float().cpu()


def load_local_model(name_or_path: str, *, device: str = "cpu", trained_by: Trained | None = None) -> LocalModel:
    """From a folder or hub id. Raises ModelError, UsageError, CheckpointError."""
    checkpoint = Checkpoint(name_or_path)
    _check_device(device)
    job = None if trained_by is None else _job_of(trained_by)
    try:
        split = (1, 1) if job is None else (job.split.head_blocks, job.split.tail_blocks)
        plan = SplitPlan(*split, checkpoint.config.num_hidden_layers)
    except JobError:
        raise ModelError(f"{name_or_path}: {checkpoint.config.num_hidden_layers} blocks cannot be split") from None
    head, tail = load_head_and_tail(checkpoint, plan, device=device)
    dtype = torch.float32 if job is None else DTYPES[job.training.trunk_dtype]
    trunk = load_part(checkpoint, plan, "trunk", dtype=dtype, device=device)
    if job is not None and trained_by is not None:
        for part in (head, trunk, tail):
            make_trainable(part, job)
        _take([head, tail], _client_tensors(trained_by.result), trained_by.result)
        if "trunk" in job.training.parts:
            _take([trunk], *_server_tensors(trained_by, job, checkpoint))
    for part in (head, trunk, tail):
        part.module.requires_grad_(False).to(device).eval()
    return LocalModel(head, trunk, tail, load_tokenizer(checkpoint), context_length(checkpoint.config), device)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device", hint="--device cpu") from None
    # torch keeps the index in eight bits: 999 is -25.
    if device.type != "cpu" and not (device.type == "cuda" and 0 <= (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(f"--device {name}: there is none here", hint="--device cpu")


def _job_of(trained_by: Trained) -> Job:
    path = trained_by.result / RESULT
    try:
        values = json.loads(path.read_text())["job"]
    except OSError:
        raise CheckpointError(
            f"{path}: no finished job", hint="name the --out folder of 'flglm client train'"
        ) from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not a job's result") from None
    job = parse_job(values, str(path))
    method: str = job.method.type
    if method not in METHODS:
        raise UsageError(f"{path}: what method.type={method} trained cannot be evaluated here")
    return job


def _client_tensors(result: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(result / TRAINED)
        return tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{result / TRAINED}: cannot be read ({error})") from None


def _server_tensors(trained_by: Trained, job: Job, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Path]:
    """The trunk's trained tensors after the last round, and where they lie."""
    folder = trained_by.server_state
    if folder is None:
        raise UsageError(
            f"{trained_by.result}: the job trained the trunk too, and that is at the server",
            hint="--server-state: the server's --state folder, where both are at hand",
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
    own = {name.removeprefix("trunk/"): value for name, value in tensors.items() if name.startswith("trunk/")}
    return own, folder


def _take(parts: Sequence[Part], values: Mapping[str, Tensor], source: Path) -> None:
    parameters = trained(parts)
    if {name: p.shape for name, p in parameters.items()} != {name: value.shape for name, value in values.items()}:
        raise CheckpointError(f"{source}: its tensors are not those that the job trains in this model")
    load_trained(parameters, values)
