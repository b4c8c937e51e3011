"""The model on this machine: there, readable, the right one; and what the parts of it that a role holds weigh."""

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from launcher.preflight.checks import Check, Checklist, fail, ok, warn
from launcher.preflight.files import short
from launcher.preflight.resources import Need
from shared.errors import FlglmError
from shared.job import Job
from shared.model.carve import Part, empty_part, tie
from shared.model.checkpoint import Checkpoint
from shared.model.plan import PartName, SplitPlan
from shared.model.trainable import make_trainable, trained

FLOAT32 = 4
# A trained value, its gradient and AdamW's two moments, all float32; on disk there is no gradient.
BYTES_TRAINED = 4 * FLOAT32
BYTES_SAVED = 3 * FLOAT32
# How many values a method of aggregation keeps of each that it aggregates.
AGGREGATOR_COPIES = {"fedavgm": 1, "fedadam": 2, "fedyogi": 2, "scaffold": 1}


def checkpoint_of(rows: Checklist, name_or_path: str, option: str, drawn_from: int | None = None) -> Checkpoint | None:
    """Row "model": configuration, tensor table and first bytes of each tensor can be read. Downloads nothing.

    `drawn_from`: the seed of weights that are not read but drawn.
    """
    folder = local_copy(name_or_path)
    if folder is None:
        rows.add(
            warn(
                "model",
                f"{name_or_path} is not on this machine; the role would download it when it starts",
                f"download it before: hf download {name_or_path}, or name a folder with {option}",
            )
        )
        return None
    return rows.attempt(
        "model",
        lambda: _readable(folder, drawn_from),
        lambda found: f"{name_or_path}: {_fingerprint(found)}",
        f"see {option}",
    )


def local_copy(name_or_path: str) -> str | None:
    """The folder of a model; for one of the hub its place in the cache, or None if it is not there."""
    path = Path(name_or_path).expanduser()
    if path.is_dir() or path.is_absolute() or name_or_path.startswith((".", "~")):
        return name_or_path
    try:
        return str(snapshot_download(name_or_path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _readable(folder: str, drawn_from: int | None) -> Checkpoint:
    checkpoint = Checkpoint(folder, drawn_from)
    checkpoint.fingerprint()
    return checkpoint


def _fingerprint(checkpoint: Checkpoint) -> str:
    found = checkpoint.fingerprint()
    return f"{len(checkpoint.files)} tensors, config {short(found.config)}, tensors {short(found.tensors)}"


def check_digest(checkpoint: Checkpoint) -> Check:
    """The SHA-256 over all bytes of the weights' files, for two owners of the same files to compare."""
    if checkpoint.drawn_from is not None:
        return ok("digest", f"no weights are read: they are drawn from seed {checkpoint.drawn_from}")
    digest = hashlib.sha256()
    try:
        for name in sorted(set(checkpoint.files.values())):
            with checkpoint.file(name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        return fail("digest", f"{checkpoint.name_or_path}: {error.strerror or error}", "copy the checkpoint anew")
    return ok("digest", f"{digest.hexdigest()} (compare it with the server's operator)")


def check_split(checkpoint: Checkpoint, job: Job) -> tuple[Check, SplitPlan | None]:
    """The job's split leaves a trunk, and this family can be split."""
    blocks = int(checkpoint.config.num_hidden_layers)
    try:
        plan = SplitPlan(job.split.head_blocks, job.split.tail_blocks, blocks)
        empty_part(checkpoint.config, plan, "head")
    except FlglmError as error:
        return fail("split", error.message, error.hint or "ask for a job with another model or split"), None
    trunk = len(plan.blocks("trunk"))
    return ok("split", f"{plan.head_blocks} + {trunk} + {plan.tail_blocks} of {blocks} blocks"), plan


def client_need(checkpoint: Checkpoint, job: Job, plan: SplitPlan, checkpoints: int) -> Need:
    """Head and tail, in plain FedAvg the trunk too, in float32; `checkpoints` of what is trained there, and the result.

    SCAFFOLD's control variates, its own and the server's, are as large as what is trained; so are what is left of
    differences, and what they are to. Raises JobError.
    """
    frozen, train = count(checkpoint, job, plan, job.client_parts)
    control = train * FLOAT32 if job.aggregation.type == "scaffold" else 0
    start = train * FLOAT32 if job.wire.compresses_updates or job.wire.compresses_averages else 0
    unsent = train * FLOAT32 if job.wire.compresses_updates else 0
    saved = checkpoints * (train * BYTES_SAVED + control + unsent) + train * FLOAT32
    return Need(frozen * FLOAT32 + train * BYTES_TRAINED + 2 * control + start + unsent, saved)


def server_need(checkpoint: Checkpoint, job: Job, plan: SplitPlan, checkpoints: int) -> Need:
    """The trunk, frozen weights in the job's dtype, the averages of the clients' parts, and what the aggregation keeps.

    Raises JobError.
    """
    frozen, train = (0, 0) if "trunk" in job.client_parts else count(checkpoint, job, plan, ("trunk",))
    averages = aggregated = count(checkpoint, job, plan, job.client_parts)[1] * FLOAT32
    if job.cohort.adapters == "per_client":
        aggregated += train * FLOAT32
        train *= job.cohort.clients
    kept = averages + AGGREGATOR_COPIES.get(job.aggregation.type, 0) * aggregated
    kept += averages if job.wire.compresses_averages else 0
    width = FLOAT32 if job.training.trunk_dtype == "float32" else 2
    memory = frozen * width + train * BYTES_TRAINED + kept
    return Need(memory, checkpoints * (train * BYTES_SAVED + kept))


def count(checkpoint: Checkpoint, job: Job, plan: SplitPlan, names: Sequence[PartName]) -> tuple[int, int]:
    """Frozen and trained values in these parts, from the configuration alone: no weights are made."""
    parts = [empty_part(checkpoint.config, plan, name) for name in names]
    if checkpoint.config.tie_word_embeddings and "head" in names and "tail" in names:
        tie(parts[names.index("head")], parts[names.index("tail")])
    for part in parts:
        with torch.device("meta"):
            make_trainable(part, job)
    train = sum(parameter.numel() for parameter in trained(parts).values())
    return _values(parts) - train, train


def _values(parts: Sequence[Part]) -> int:
    each = {id(p): p.numel() for p in chain.from_iterable(part.module.parameters() for part in parts)}
    return sum(each.values())
