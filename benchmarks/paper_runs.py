"""The runs of benchmarks.paper: one task, one seed, one way of training."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import Figures
from benchmarks.corpora import choice_task, examples, pairs, rows_of, shortened, shuffled
from benchmarks.in_turn import InTurn
from benchmarks.joint_run import Trunks, train
from benchmarks.verdicts import blind_score, score_of
from benchmarks.whole_scores import metrics, whole_with
from launcher.baselines import fit_whole
from launcher.partition.rules import by_size, equal_shares
from shared.job import Job, Lora, Method, Prefix, parse_job
from worker_client.data import Row
from worker_client.evaluation.cases import Example

WARMUP_RATIO = 0.1
# Nobody is given up: in turns a client waits for all others.
DEADLINE_S = 3600.0

METHODS = ("lora", "prefix")


@dataclass(frozen=True)
class Way:
    """`settings`: what it changes in each section of the job. `in_turn`: clients train one after the other."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    in_turn: bool = False
    one_process: bool = False


WAYS: dict[str, Way] = {
    "centralised": Way(one_process=True),
    "sequential": Way({"cohort": {"mode": "greedy"}}, in_turn=True),
    "client_batch": Way(),
    "server_hierarchical": Way({"cohort": {"adapters": "per_client"}}),
    "plain_fedavg": Way({"split": {"trunk": "client"}}),
}


@dataclass(frozen=True)
class Settings:
    """What all cells share. `batch`: rows a step of one client; at most `rows` to train on, `questions` to answer."""

    model: str
    method: str
    virtual_tokens: int
    learning_rate: float
    clients: int
    batch: int
    steps: int
    local_steps: int
    max_length: int
    rows: int
    questions: int


@dataclass(frozen=True)
class TaskData:
    name: str
    rows: Sequence[Row]
    questions: Sequence[Example]

    @property
    def blind(self) -> float:
        return blind_score(self.questions, choice_task(self.name).metrics)


def task_files(folder: Path, name: str) -> tuple[Path, Path] | None:
    """`<folder>/<task>/train.*` and `val.*`, if both are there; the task's name in any case, as in SuperGLUE."""
    if not folder.is_dir():
        return None
    for child in sorted(folder.iterdir()):
        if child.is_dir() and child.name.lower() == name:
            found = [next(iter(sorted(child.glob(f"{part}.*"))), None) for part in ("train", "val")]
            if found[0] is not None and found[1] is not None:
                return found[0], found[1]
    return None


def load_task(name: str, files: tuple[Path, Path], tokenizer: Any, settings: Settings) -> TaskData:
    """Raises DataError."""
    train_file, test_file = files
    asked = shuffled(examples(name, train_file), 0)[: settings.rows]
    fitted = [shortened(pair, tokenizer, settings.max_length) for pair in pairs(asked)]
    questions = shuffled(examples(name, test_file), 0)[: settings.questions]
    return TaskData(name, rows_of(fitted, tokenizer, settings.max_length), questions)


def make_job(settings: Settings, way: Way, seed: int) -> Job:
    method: Method = Lora(r=8, lora_alpha=16)
    if settings.method == "prefix":
        method = Prefix(num_virtual_tokens=settings.virtual_tokens)
    values: dict[str, dict[str, Any]] = {
        "training": {
            "per_device_train_batch_size": settings.batch,
            "learning_rate": settings.learning_rate,
            "warmup_ratio": WARMUP_RATIO,
            "seed": seed,
        },
        "data": {"max_length": settings.max_length},
        "rounds": {
            "count": settings.steps // settings.local_steps,
            "local_steps": settings.local_steps,
            "evaluate_every": settings.steps,
        },
        "cohort": {"clients": settings.clients, "deadline_s": DEADLINE_S},
    }
    for section, changes in way.settings.items():
        values[section] = values.get(section, {}) | dict(changes)
    return parse_job(
        {"model_name_or_path": settings.model, "method": method.model_dump(), **values}, "the benchmark's job"
    )


def deal(rows: Sequence[Row], clients: int, seed: int) -> dict[str, list[Row]]:
    """Equal shares, drawn by `seed`."""
    dealt: dict[str, list[Row]] = {f"client-{number}": [] for number in range(clients)}
    for row, client in zip(rows, by_size(len(rows), equal_shares(clients), seed), strict=True):
        dealt[f"client-{client}"].append(row)
    return dealt


def measure(
    settings: Settings, data: TaskData, tokenizer: Any, way: Way, seed: int, *, device: str, threads: int
) -> Figures:
    """Train, then answer the task's questions with the whole model. `seconds` are those of training; `bytes` of all
    clients, up and down."""
    job = make_job(settings, way, seed)
    dealt = deal(data.rows, settings.clients, seed)
    sent = received = 0
    if way.one_process:
        began = time.monotonic()
        model, _ = fit_whole(job, dealt, threads=threads, device=device)
        seconds = time.monotonic() - began
    else:
        trunks = InTurn(clients=tuple(dealt), local_steps=settings.local_steps) if way.in_turn else Trunks()
        with tempfile.TemporaryDirectory() as folder:
            run = train(job, dealt, Path(folder), trunks=trunks, device=device, threads=threads)
        model, seconds = whole_with(job, run.trained, device), run.seconds
        sent, received = sum(run.bytes_up.values()), sum(run.bytes_down.values())
    found = metrics(model, tokenizer, data.name, data.questions, settings.max_length)
    return {
        "score": score_of(found),
        "metrics": found,
        "blind": data.blind,
        "seconds": seconds,
        "bytes_up": sent,
        "bytes_down": received,
    }
