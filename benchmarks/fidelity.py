"""Is split training exact? The split system against plain PyTorch on the same batches, for every family, in fp32.

Case "everything": one client; every weight is trained. Case "trunk": three clients in lockstep, head and tail frozen,
against one process on the concatenated batch. Each 20 AdamW steps with clipping, weight decay and a linear schedule;
compared are every step's loss, the logits and every trained tensor at the end. Llama runs as real processes as well,
and in all the other modes and methods (FedSGD of three clients' heads and tails against one process on the
concatenated batch, prompt and prefix tuning against peft's): those that promise exactness, and,
marked as approximate, how far each of the others is.
"""

import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.plain import load_plain, row_logits, train_plain
from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import VOCABULARY, save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.in_process import Outcome, Site, train_in_process, trunk_tensors
from launcher.whole_models import drawn_whole, with_method
from shared.job import Aggregation, Cohort, Full, Job, Lora, Method, Prefix, Prompt, Rounds, Split, Training, Wire
from shared.model.checkpoint import SINGLE, Checkpoint
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


def write_random_rows(path: Path, count: int, seed: int) -> Path:
    """The tokens of `random_rows` as a JSONL file of texts, for the tokenizer of `save_word_tokenizer`."""
    texts = [" ".join(f"w{token}" for token in row.input_ids) for row in random_rows(count, seed)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_rows(count: int, seed: int) -> list[Row]:
    """Rows of 3 to 20 random tokens; those of the first few count not, the rest do."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randrange(3, 21)))
        prompt = draw.randrange(0, len(ids) - 1)
        rows.append(Row(ids, tuple(position >= prompt for position in range(len(ids)))))
    return rows


@dataclass(frozen=True)
class Case:
    """A way to train. `settings`: what it changes in each section of the job. `exact`: promised to be."""

    parts: tuple[PartName, ...]
    clients: int
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    method: Method = field(default_factory=Full)
    exact: bool = True


ALL: tuple[PartName, ...] = ("head", "trunk", "tail")
TRUNK: tuple[PartName, ...] = ("trunk",)
HEAD: tuple[PartName, ...] = ("head",)
FOUR_UNDER_WAY = {"training": {"gradient_accumulation_steps": 4}, "cohort": {"in_flight": 4}}
FEDSGD: dict[str, Mapping[str, Any]] = {"aggregation": {"type": "fedsgd"}, "rounds": {"count": STEPS, "local_steps": 1}}
PLAIN_FEDAVG = {"split": {"trunk": "client"}}
CASES = {"everything": Case(ALL, 1), "trunk": Case(TRUNK, 3)}
MODES = {
    "LoRA": Case(ALL, 1, method=Lora(r=4)),
    "from scratch": Case(ALL, 1, {"training": {"from_scratch": True}}),
    "plain FedAvg": Case(ALL, 1, PLAIN_FEDAVG),
    "plain FedAvg, LoRA": Case(ALL, 1, PLAIN_FEDAVG, Lora(r=4)),
    "rsLoRA": Case(ALL, 1, method=Lora(r=4, use_rslora=True)),
    "DoRA": Case(ALL, 1, method=Lora(r=4, use_dora=True)),
    "prefix": Case(ALL, 1, method=Prefix(num_virtual_tokens=5)),
    "prompt": Case(HEAD, 1, method=Prompt(num_virtual_tokens=5)),
    "FedSGD, 3 clients, everything": Case(ALL, 3, FEDSGD),
    "FedSGD, 3 clients, LoRA": Case(ALL, 3, FEDSGD, Lora(r=4)),
    "FedSGD, plain FedAvg": Case(ALL, 3, FEDSGD | PLAIN_FEDAVG),
    "4 micro-batches in flight, everything": Case(ALL, 1, FOUR_UNDER_WAY),
    "4 micro-batches in flight, trunk": Case(TRUNK, 3, FOUR_UNDER_WAY),
    "graphs computed again": Case(TRUNK, 3, {"server": {"max_kept_tokens": 0}}),
    "greedy, one client": Case(ALL, 1, {"cohort": {"mode": "greedy"}}),
    "greedy": Case(TRUNK, 3, {"cohort": {"mode": "greedy"}}, exact=False),
    "greedy, 4 in flight": Case(TRUNK, 3, {"cohort": {"mode": "greedy", "in_flight": 4}}, exact=False),
    "per-client adapters, LoRA": Case(TRUNK, 3, {"cohort": {"adapters": "per_client"}}, Lora(r=4), exact=False),
    "per-client adapters, rsLoRA": Case(
        TRUNK, 3, {"cohort": {"adapters": "per_client"}}, Lora(r=4, use_rslora=True), exact=False
    ),
    "per-client prefixes": Case(
        ALL, 3, {"cohort": {"adapters": "per_client"}}, Prefix(num_virtual_tokens=5), exact=False
    ),
    "bfloat16 trunk, LoRA": Case(TRUNK, 3, {"training": {"trunk_dtype": "bfloat16"}}, Lora(r=4), exact=False),
    **{
        f"{name} on the wire": Case(TRUNK, 3, {"wire": {"hidden": name, "gradient": name}}, exact=False)
        for name in ("bfloat16", "float16", "int8", "int4")
    },
}


def make_job(model: Path, case: Case) -> Job:
    changes = case.settings
    training: dict[str, Any] = {"per_device_train_batch_size": BATCH, "learning_rate": 1e-3, "weight_decay": 0.01}
    training |= {"parts": case.parts, "seed": 3, **changes.get("training", {})}
    return Job(
        model_name_or_path=str(model),
        split=Split(**{"head_blocks": 1, "tail_blocks": 1, **changes.get("split", {})}),
        method=case.method,
        training=Training(**training),
        rounds=Rounds(**{"count": 1, "local_steps": STEPS, **changes.get("rounds", {})}),
        cohort=Cohort(**{"clients": case.clients, **changes.get("cohort", {})}),
        aggregation=TypeAdapter(Aggregation).validate_python({"type": "fedavg", **changes.get("aggregation", {})}),
        wire=Wire(**changes.get("wire", {})),
    )


def compare(family: str, name: str, folder: Path) -> Comparison:
    """Train split and plain; say how far apart they end."""
    model = save_tiny_model(family, folder / "model")
    case = (CASES | MODES)[name]
    job = make_job(model, case)
    if job.training.from_scratch:
        (model / SINGLE).unlink()
    rows = {f"client-{seed}": random_rows(10, seed) for seed in range(case.clients)}
    outcomes = train_in_process(
        job, {client: Site(mine) for client, mine in rows.items()}, folder / "split", **case.settings.get("server", {})
    )
    return difference(
        family, name, job, rows, split_losses(outcomes, job, rows), tensors_of(outcomes, folder / "split")
    )


def compare_processes(family: str, folder: Path) -> Comparison:
    """Case "trunk" once more, with broker, server and three clients as processes, data and result through files."""
    model = save_tiny_model(family, folder / "model")
    save_word_tokenizer(model)
    tokenizer = load_tokenizer(Checkpoint(str(model)))
    names = ["a", "b", "c"]
    job = make_job(model, CASES["trunk"])
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
    return [[row for _, mine in sorted(rows.items()) for row in of_step(job, mine, step)] for step in range(STEPS)]


def of_step(job: Job, rows: Sequence[Row], step: int) -> list[Row]:
    """One client's rows of a step, over all its micro-batches."""
    training = job.training
    count = training.gradient_accumulation_steps
    size, seed = training.per_device_train_batch_size, training.seed
    numbers = range(step * count, (step + 1) * count)
    return [rows[i] for number in numbers for i in batch_indices(len(rows), size, number, seed)]


def split_losses(outcomes: Mapping[str, Outcome], job: Job, rows: Mapping[str, Sequence[Row]]) -> list[float]:
    return weighted_losses({name: outcome.events for name, outcome in outcomes.items()}, job, rows)


def weighted_losses(
    events: Mapping[str, list[dict[str, Any]]], job: Job, rows: Mapping[str, Sequence[Row]]
) -> list[float]:
    """The cohort's mean loss a step, from each client's mean and its count of target tokens."""
    totals, sums = [0] * job.total_steps, [0.0] * job.total_steps
    for name, mine in rows.items():
        for event in events[name]:
            if event.get("event") == "step":
                step = event["step"]
                tokens = sum(row.target_tokens for row in of_step(job, mine, step))
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
    model = drawn_whole(job) if job.training.from_scratch else load_plain(job.model_name_or_path)
    blocks = model.config.num_hidden_layers
    model, by_name = with_method(model, job, FAMILIES[family])
    model.requires_grad_(False)
    trunk = {name for name in trained if "trunk" not in job.client_parts and _block(name) in range(1, blocks - 1)}
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
        results += [run(family, case) for case in CASES]
    modes = [run("llama", mode) for mode in MODES]
    with tempfile.TemporaryDirectory() as folder:
        results.append(compare_processes("llama", Path(folder)))
    results += [result for result in modes if MODES[result.case].exact]
    approximate = [result for result in modes if not MODES[result.case].exact]
    worst = max(result.loss for result in results)
    publish(
        "fidelity",
        ["family", "case", "loss", "logits", "trained tensors", "worst of them"],
        [_line(r, "") for r in results] + [_line(r, " (approximate)") for r in approximate],
        {
            "max_relative_loss_difference": worst,
            "max_relative_logits_difference": max(result.logits for result in results),
            "max_relative_tensor_difference": max(result.tensors for result in results),
            "cases": [vars(result) for result in results],
            "approximate": [vars(result) for result in approximate],
        },
        [Goal("max_relative_loss_difference", worst, GOAL, at_most=True)],
        as_json=arguments.json,
    )


def _line(result: Comparison, kind: str) -> list[str]:
    figures = [f"{figure:.1e}" for figure in (result.loss, result.logits, result.tensors)]
    return [result.family, result.case + kind, *figures, result.worst_tensor]


def run(family: str, case: str) -> Comparison:
    with tempfile.TemporaryDirectory() as folder:
        result = compare(family, case, Path(folder))
    print(f"{family:12} {case:40} {result.loss:.1e}", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
