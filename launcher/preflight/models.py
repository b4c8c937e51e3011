"""The model on this machine: there, readable, the right one; and what the parts of it that a role holds weigh."""

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from launcher.preflight.checks import Check, Checklist, fail, ok, warn
from launcher.preflight.files import short
from launcher.preflight.resources import Need
from shared.error_feedback import most_bytes
from shared.errors import FlglmError
from shared.job import Job
from shared.model.carve import Part, empty_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import PartName, SplitPlan
from shared.model.residuals import Residuals
from shared.model.trainable import trained, weightless_parts
from shared.payload.codecs import CODECS
from worker_client.data import Row

FLOAT32 = 4
# A trained value, its gradient and AdamW's two moments, all float32; on disk there is no gradient.
BYTES_TRAINED = 4 * FLOAT32
BYTES_SAVED = 3 * FLOAT32
# What masking takes for a value while a round ends: its words (8 bytes) and the difference at the client; the sum's
# words, the mean and the change at the server.
MASKED_AT_CLIENT = 8 + 4
MASKED_WORD = 8
# What opening a sum under a group's key takes beside that: the words as they came and a copy, the start and the mean,
# and for a moment three times float64.
OPENED_AT_CLIENT = 8 + 8 + 4 + 4 + 24
MASKED_AT_SERVER = 8 + 4 + 8
# How many values a method of aggregation keeps of each that it aggregates.
AGGREGATOR_COPIES = {"fedavgm": 1, "fedadam": 2, "fedyogi": 2, "fedsgd": 2, "scaffold": 1}


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

    SCAFFOLD's control variates, its own before and after a round and the server's, are as large as what is trained, and
    so is a private update, beside, for a moment, difference and noise in float64. FedEx-LoRA's residuals are as large
    as the weights under the adapters, which are kept as they were, too. What is left of differences that travel in part
    is kept. Whoever needs what a round began with has it once. Raises JobError.
    """
    frozen, train = count(checkpoint, job, plan, job.client_parts)
    control = train * FLOAT32 if job.aggregation.type == "scaffold" else 0
    private = train * FLOAT32 if job.privacy.type != "none" else 0
    masked = 0 if job.secure == "off" else train * MASKED_AT_CLIENT
    masked += 0 if job.aggregation.group_key is None else train * OPENED_AT_CLIENT
    residual = residual_values(checkpoint, job, plan, job.handed_in) * FLOAT32
    start = train * FLOAT32 if job.keeps_round_start else 0
    unsent = 2 * train * FLOAT32 if job.wire.compresses_updates else 0
    saved = checkpoints * (train * BYTES_SAVED + 2 * control + private + unsent) + train * FLOAT32 + residual
    memory = frozen * FLOAT32 + train * BYTES_TRAINED + 3 * control + 2 * residual + 5 * private + masked
    return Need(memory + start + unsent, saved)


def round_traffic(checkpoint: Checkpoint, job: Job, plan: SplitPlan) -> tuple[int, int]:
    """The most bytes of tensors that one client sends and gets in a round, evaluations aside; seals and headers add
    little.

    Up go the update, hidden states and gradients of batches of full length; down come averages with what the
    aggregation adds to them, hidden states, and gradients where the head is trained. Under a group's key, too, a sum
    that it opens, and the averages in a box. A ring (aggregation.secure) that loses members while it sums has the
    others send their updates again. Raises JobError.
    """
    handed_in = count(checkpoint, job, plan, job.handed_in)[1]
    wire = job.wire
    update = most_bytes(handed_in, wire.update_density, wire.update) if job.secure == "off" else handed_in * MASKED_WORD
    told = most_bytes(handed_in, wire.average_density, wire.average)
    told += handed_in * FLOAT32 if job.aggregation.type == "scaffold" else 0
    told += residual_values(checkpoint, job, plan, job.handed_in) * FLOAT32
    if job.aggregation.group_key is not None:
        update, told = update + handed_in * FLOAT32, told + handed_in * MASKED_WORD
    if "trunk" in job.client_parts:
        return update, told
    training = job.training
    shape = (training.per_device_train_batch_size * job.data.max_length, int(checkpoint.config.hidden_size))
    batches = job.rounds.local_steps * training.gradient_accumulation_steps
    hidden, gradient = (batches * CODECS[name].size(shape) for name in (job.wire.hidden, job.wire.gradient))
    return update + hidden + gradient, told + hidden + (gradient if "head" in training.parts else 0)


def evaluation_traffic(checkpoint: Checkpoint, job: Job, rows: Sequence[Row]) -> int:
    """Bytes of hidden states that a client sends to have these rows scored, and gets back as many."""
    if "trunk" in job.client_parts:
        return 0
    size, width = job.training.per_device_train_batch_size, int(checkpoint.config.hidden_size)
    codec, lengths = CODECS[job.wire.hidden], [job.prompt_tokens + len(row.input_ids) for row in rows]
    return sum(codec.size((sum(lengths[start : start + size]), width)) for start in range(0, len(lengths), size))


def server_need(checkpoint: Checkpoint, job: Job, plan: SplitPlan, checkpoints: int) -> Need:
    """The trunk, frozen weights in the job's dtype, the averages of the clients' parts, and what the aggregation keeps.

    Raises JobError.
    """
    frozen, train = (0, 0) if "trunk" in job.client_parts else count(checkpoint, job, plan, ("trunk",))
    handed_in = count(checkpoint, job, plan, job.handed_in)[1]
    averages = aggregated = handed_in * FLOAT32
    residual = residual_values(checkpoint, job, plan, job.handed_in) * FLOAT32
    in_trunk = 0
    if job.cohort.adapters == "per_client":
        aggregated += train * FLOAT32
        train *= job.cohort.clients
        in_trunk = residual_values(checkpoint, job, plan, ("trunk",)) * FLOAT32
    kept = averages + AGGREGATOR_COPIES.get(job.aggregation.type, 0) * aggregated + residual + in_trunk
    kept += averages if job.wire.compresses_averages else 0
    width = FLOAT32 if job.training.trunk_dtype == "float32" else 2
    memory = frozen * width + train * BYTES_TRAINED + kept + 2 * in_trunk
    memory += 0 if job.secure == "off" else handed_in * MASKED_AT_SERVER
    return Need(memory, checkpoints * (train * BYTES_SAVED + kept))


def count(checkpoint: Checkpoint, job: Job, plan: SplitPlan, names: Sequence[PartName]) -> tuple[int, int]:
    """Frozen and trained values in these parts, from the configuration alone: no weights are made."""
    parts = weightless_parts(checkpoint.config, plan, job, names)
    train = sum(parameter.numel() for parameter in trained(parts).values())
    return _values(parts) - train, train


def residual_values(checkpoint: Checkpoint, job: Job, plan: SplitPlan, names: Sequence[PartName]) -> int:
    """How many weights `aggregation.lora: exact` adds to in these parts; it sends as many values after a round."""
    layers = Residuals(weightless_parts(checkpoint.config, plan, job, names), job).layers
    return sum(layer.weight.numel() for layer, _ in layers.values())


def _values(parts: Sequence[Part]) -> int:
    each = {id(p): p.numel() for p in chain.from_iterable(part.module.parameters() for part in parts)}
    return sum(each.values())
