"""Is split training exact? The split system against plain PyTorch on the same batches, for every family, in fp32.

Case "everything": one client; every weight is trained. Case "trunk": three clients in lockstep, head and tail frozen,
against one process on the concatenated batch. Each 20 AdamW steps with clipping, weight decay and a linear schedule;
compared are every step's loss, the logits and every trained tensor at the end. Llama runs as real processes as well.
"""

import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import load_plain, row_logits, train_plain
from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import VOCABULARY, save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.in_process import Outcome, Site, train_in_process, trunk_tensors
from shared.job import Cohort, Full, Job, Rounds, Split, Training
from shared.model.checkpoint import Checkpoint
from shared.model.families import FAMILIES
from shared.model.plan import PartName
from worker_client.batches import batch_indices
from worker_client.client import load_tokenizer
from worker_client.data import Row, load_rows

STEPS = 20
BATCH = 4
GOAL = 1e-5


@dataclass(frozen=True)
class Comparison:
    """Largest relative differences: of a step's loss; of a logit and of a trained value, against the largest there."""

    family: str
    case: str
    loss: float
    logits: float
    tensors: float
    worst_tensor: str


def random_rows(count: int, seed: int) -> list[Row]:
    """Rows of 3 to 20 random tokens; those of the first few count not, the rest do."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randrange(3, 21)))
        prompt = draw.randrange(0, len(ids) - 1)
        rows.append(Row(ids, tuple(position >= prompt for position in range(len(ids)))))
    return rows


def make_job(model: Path, parts: tuple[PartName, ...], clients: int) -> Job:
    return Job(
        model_name_or_path=str(model),
        split=Split(head_blocks=1, tail_blocks=1),
        method=Full(),
        training=Training(
            per_device_train_batch_size=BATCH, learning_rate=1e-3, weight_decay=0.01, parts=parts, seed=3
        ),
        rounds=Rounds(count=1, local_steps=STEPS),
        cohort=Cohort(clients=clients),
    )


def compare(family: str, case: str, folder: Path) -> Comparison:
    """Train split and plain; say how far apart they end."""
    model = save_tiny_model(family, folder / "model")
    names = ["only"] if case == "everything" else ["a", "b", "c"]
    job = make_job(model, ("head", "trunk", "tail") if case == "everything" else ("trunk",), len(names))
    rows = {name: random_rows(10, seed) for seed, name in enumerate(names)}
    outcomes = train_in_process(job, {name: Site(mine) for name, mine in rows.items()}, folder / "split")
    return difference(
        family, case, job, rows, split_losses(outcomes, job, rows), tensors_of(outcomes, folder / "split")
    )


def compare_processes(family: str, folder: Path) -> Comparison:
    """Case "trunk" once more, with broker, server and three clients as processes, data and result through files."""
    model = save_tiny_model(family, folder / "model")
    save_word_tokenizer(model)
    tokenizer = load_tokenizer(Checkpoint(str(model)))
    names = ["a", "b", "c"]
    job = make_job(model, ("trunk",), len(names))
    sites, rows = [], {}
    for seed, name in enumerate(names):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(_as_text(row)) + "\n" for row in random_rows(10, seed)))
        sites.append(local_run.Site(name, path, path))
        rows[name] = load_rows(path, tokenizer, max_length=job.data.max_length).rows
    run = local_run.train_together(job, sites, folder / "split")
    losses = weighted_losses(run.events, job, rows)
    return difference(family, "trunk, processes", job, rows, losses, trunk_tensors(folder / "split"))


def _as_text(row: Row) -> dict[str, str]:
    words = [f"w{token}" for token in row.input_ids]
    prompt = max(1, row.counts.index(True))
    return {"prompt": " ".join(words[:prompt]), "completion": " ".join(words[prompt:])}


def batches(job: Job, rows: Mapping[str, Sequence[Row]]) -> list[list[Row]]:
    """The concatenated batch of each step, clients in order of their names."""
    size, seed = job.training.per_device_train_batch_size, job.training.seed
    return [
        [mine[i] for _, mine in sorted(rows.items()) for i in batch_indices(len(mine), size, step, seed)]
        for step in range(job.total_steps)
    ]


def split_losses(outcomes: Mapping[str, Outcome], job: Job, rows: Mapping[str, Sequence[Row]]) -> list[float]:
    return weighted_losses({name: outcome.events for name, outcome in outcomes.items()}, job, rows)


def weighted_losses(
    events: Mapping[str, list[dict[str, Any]]], job: Job, rows: Mapping[str, Sequence[Row]]
) -> list[float]:
    """The cohort's mean loss a step, from each client's mean and its count of target tokens."""
    size, seed = job.training.per_device_train_batch_size, job.training.seed
    totals, sums = [0] * job.total_steps, [0.0] * job.total_steps
    for name, mine in rows.items():
        for event in events[name]:
            if event.get("event") == "step":
                step = event["step"]
                tokens = sum(mine[i].target_tokens for i in batch_indices(len(mine), size, step, seed))
                totals[step] += tokens
                sums[step] += event["loss"] * tokens
    return [total_loss / tokens for total_loss, tokens in zip(sums, totals, strict=True)]


def tensors_of(outcomes: Mapping[str, Outcome], folder: Path) -> dict[str, Tensor]:
    """All that was trained, by name in the whole model: the trunk's at the server, head and tail at a client."""
    parts = next(iter(outcomes.values())).parts
    return trunk_tensors(folder) | {name: p.detach() for name, p in parts.parameters.items()}


def difference(
    family: str,
    case: str,
    job: Job,
    rows: Mapping[str, Sequence[Row]],
    losses: Sequence[float],
    trained: Mapping[str, Tensor],
) -> Comparison:
    model = load_plain(job.model_name_or_path)
    by_name = dict(model.named_parameters())
    model.requires_grad_(False)
    trunk = {
        name for name in trained if name in by_name and _block(name) in range(1, model.config.num_hidden_layers - 1)
    }
    groups = [[by_name[n] for n in trained if n not in trunk], [by_name[n] for n in trained if n in trunk]]
    groups = [group for group in groups if group]
    for group in groups:
        for parameter in group:
            parameter.requires_grad_(True)
    expected = train_plain(model, batches(job, rows), job.training, job.total_steps, groups)
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    tensors, worst = max((_relative(trained[name], by_name[name].detach()), name) for name in trained)
    with torch.no_grad():
        model.eval()
        row = next(iter(rows.values()))[0]
        before = row_logits(model, row)
        for name, value in trained.items():
            by_name[name].copy_(value)
        logits = _relative(row_logits(model, row), before)
    return Comparison(family, case, loss, logits, tensors, worst)


def _block(name: str) -> int:
    return next((int(piece) for piece in name.split(".") if piece.isdigit()), -1)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def main() -> None:
    arguments = parser("fidelity", __doc__).parse_args()
    torch.set_num_threads(1)
    families = ["llama", "gpt2", "gemma2"] if arguments.quick else list(FAMILIES)
    results: list[Comparison] = []
    for family in families:
        for case in ("everything", "trunk"):
            with tempfile.TemporaryDirectory() as folder:
                results.append(compare(family, case, Path(folder)))
                print(f"{family:12} {case:12} {results[-1].loss:.1e}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        results.append(compare_processes("llama", Path(folder)))
    worst = max(result.loss for result in results)
    publish(
        "fidelity",
        ["family", "case", "loss", "logits", "trained tensors", "worst of them"],
        [[r.family, r.case, f"{r.loss:.1e}", f"{r.logits:.1e}", f"{r.tensors:.1e}", r.worst_tensor] for r in results],
        {
            "max_relative_loss_difference": worst,
            "max_relative_logits_difference": max(result.logits for result in results),
            "max_relative_tensor_difference": max(result.tensors for result in results),
            "cases": [vars(result) for result in results],
        },
        [Goal("max_relative_loss_difference", worst, GOAL, at_most=True)],
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
