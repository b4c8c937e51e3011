"""The runs of benchmarks.methods, a function a kind: joint (real processes), centralised and alone (one process).

All are scored alike: the whole model on the corpus's test rows and questions.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.cells import Figures
from benchmarks.client_flops import step_flops
from benchmarks.corpora import Corpus, rows_of
from benchmarks.joint_run import train
from benchmarks.method_table import WARMUP_RATIO, MethodRow, Setting
from benchmarks.whole_scores import held_out_loss, metrics, whole_with
from launcher import local_run
from launcher.baselines import fit_whole
from launcher.partition.rules import by_field, by_size, equal_shares
from shared.job import Job, parse_job
from shared.model.checkpoint import Checkpoint, checkpoint_of
from worker_client.batches import batch_indices, pack_rows
from worker_client.client import load_tokenizer
from worker_client.data import Row
from worker_client.head_tail import load_client_parts
from worker_client.shapes import Pair

DEADLINE_S = 600.0
# Of each role's arithmetic, and of the process that trains alone.
THREADS = 1
# A client's batches differ in length: the mean of so many counts for all.
FLOPS_STEPS = 4

Dealt = dict[str, list[Pair]]


@dataclass(frozen=True)
class Bench:
    """What all runs on one corpus share. `batch`: rows a step of all clients together; `local_steps` between averages,
    unless a run has others; `steps` is a multiple of them."""

    model: Path
    corpus: Corpus
    steps: int
    local_steps: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", load_tokenizer(Checkpoint(str(self.model))))
        object.__setattr__(self, "test", self.rows(self.corpus.test))

    tokenizer: Any = None
    test: Sequence[Row] = ()

    def rows(self, found: Sequence[Pair]) -> list[Row]:
        return rows_of(found, self.tokenizer, self.corpus.max_length)


def deal(corpus: Corpus, setting: Setting, seed: int) -> Dealt:
    """Each client's pairs: those of a source, or an equal share of all, drawn by `seed`."""
    labels = [source for source, mine in corpus.train.items() for _ in mine]
    pooled = [pair for mine in corpus.train.values() for pair in mine]
    if setting.by_source:
        assigned = by_field(labels, None)
    else:
        assigned = by_size(len(pooled), equal_shares(setting.clients), seed)
    dealt: Dealt = {f"client-{number}": [] for number in range(setting.clients)}
    for pair, client in zip(pooled, assigned, strict=True):
        dealt[f"client-{client}"].append(pair)
    return dealt


def make_job(
    bench: Bench,
    row: MethodRow,
    clients: int,
    *,
    batch: int | None = None,
    steps: int | None = None,
    local_steps: int | None = None,
    training: Mapping[str, Any] | None = None,
    aggregation: Mapping[str, Any] | None = None,
) -> Job:
    """`batch` and `steps`: if not the bench's. `training` and `aggregation`: what differs from AdamW at the method's
    rate with linear decay, and FedAvg."""
    batch, steps, local_steps = batch or bench.batch, steps or bench.steps, local_steps or bench.local_steps
    return parse_job(
        {
            "model_name_or_path": str(bench.model),
            "split": {"trunk": row.trunk},
            "method": row.method.model_dump(),
            "training": {
                "parts": row.parts,
                "per_device_train_batch_size": batch // clients,
                "learning_rate": row.rates[bench.corpus.name],
                "warmup_ratio": WARMUP_RATIO,
                "seed": bench.seed,
                **(training or {}),
            },
            "data": {"max_length": bench.corpus.max_length + row.virtual_tokens},
            "rounds": {
                "count": steps // local_steps,
                "local_steps": local_steps,
                "evaluate_every": steps,
            },
            "cohort": {"clients": clients, "deadline_s": DEADLINE_S},
            **({"aggregation": aggregation} if aggregation else {}),
        },
        "the benchmark's job",
    )


def scored(bench: Bench, model: nn.Module) -> Figures:
    """`loss` on the test rows; `metrics` of each task, and `accuracy`, their mean over tasks, where there are any."""
    context = bench.corpus.max_length
    by_task = {
        task: metrics(model, bench.tokenizer, task, questions, context)
        for task, questions in bench.corpus.questions.items()
    }
    figures: Figures = {"loss": held_out_loss(model, bench.test), "metrics": by_task}
    if by_task:
        figures["accuracy"] = sum(found["accuracy"] for found in by_task.values()) / len(by_task)
    return figures


# Joint


def joint(bench: Bench, job: Job, dealt: Dealt) -> Figures:
    """The job with all roles in this process; bytes and operations are a client's."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(job, {client: bench.rows(mine) for client, mine in dealt.items()}, Path(folder), threads=THREADS)
    return scored(bench, whole_with(job, run.trained)) | {
        "bytes_up_per_client": sum(run.bytes_up.values()) // len(dealt),
        "bytes_down_per_client": sum(run.bytes_down.values()) // len(dealt),
        "client_flops": client_flops(bench, job, dealt),
        "seconds": run.seconds,
    }


def footprint(bench: Bench, job: Job, mine: Sequence[Pair]) -> Figures:
    """Peak resident bytes of broker, server and one client of this job as processes, libraries included.

    A few steps suffice: whatever a process ever holds it holds in the first two, and in those after a round.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_pairs(folder / "client.jsonl", mine)
        held_out = write_pairs(folder / "held-out.jsonl", bench.corpus.test[:1])
        run = local_run.train_together(job, [local_run.Site("client", data, held_out)], folder / "run")
    return {f"{process.role}_peak_bytes": process.peak_memory_bytes for process in run.processes}


def write_pairs(path: Path, found: Sequence[Pair]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p.prompt, "completion": p.completion}) + "\n" for p in found))
    return path


def client_flops(bench: Bench, job: Job, dealt: Dealt) -> int:
    """Of one client's whole training, from its first steps; the mean over the clients."""
    parts = load_client_parts(checkpoint_of(job), job)
    parts.train_mode(True)
    size, seed = job.training.per_device_train_batch_size, job.training.seed
    counted = []
    for mine in dealt.values():
        rows = bench.rows(mine)
        for step in range(min(FLOPS_STEPS, job.total_steps)):
            chosen = [rows[index] for index in batch_indices(len(rows), size, step, seed)]
            counted.append(step_flops(parts, pack_rows(chosen, job.prompt_tokens)))
    return sum(counted) * job.total_steps // len(counted)


# One process


def whole(bench: Bench, job: Job, dealt: Dealt) -> Figures:
    """One process on all that was dealt: each step takes the rows that the job's clients would take in it."""
    began = time.monotonic()
    model, _ = fit_whole(job, {client: bench.rows(mine) for client, mine in dealt.items()}, threads=THREADS)
    return {"seconds": time.monotonic() - began} | scored(bench, model)


def alone(bench: Bench, job: Job, dealt: Dealt) -> Figures:
    """Each client by itself, with its own rows of each step; `loss` and `accuracy` are means over the clients."""
    each = {client: whole(bench, job, {client: mine}) for client, mine in dealt.items()}
    figures: Figures = {"by_client": each, "loss": mean(each, "loss"), "seconds": mean(each, "seconds")}
    if bench.corpus.questions:
        figures["accuracy"] = mean(each, "accuracy")
    return figures


def mean(each: Mapping[str, Figures], name: str) -> float:
    return sum(float(figures[name]) for figures in each.values()) / len(each)


# Learning rates

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)


def descend(grid: Sequence[float], start: float, loss: Callable[[float], float]) -> dict[float, float]:
    """The loss by rate, from `start` downhill until both neighbours of the lowest are known, or the grid ends."""
    losses = {start: loss(start)}
    while True:
        best = grid.index(min(losses, key=lambda rate: losses[rate]))
        missing = [rate for rate in grid[max(0, best - 1) : best + 2] if rate not in losses]
        if not missing:
            return losses
        losses[missing[-1]] = loss(missing[-1])


def tune(bench: Bench, row: MethodRow, training: Mapping[str, Any], start: float) -> dict[float, float]:
    """Centralised, on the rows of three IID clients: the loss on the corpus's `tune` rows by learning rate."""
    dealt = {client: bench.rows(mine) for client, mine in deal(bench.corpus, Setting(3, False), bench.seed).items()}
    rows = bench.rows(bench.corpus.tune)

    def loss(rate: float) -> float:
        job = make_job(bench, row, 3, training={**training, "learning_rate": rate})
        return held_out_loss(fit_whole(job, dealt, threads=THREADS)[0], rows)

    return descend(GRID, start, loss)
