"""FL-GLM's comparison (arXiv 2406.14898): ways of split training against one process, over SuperGLUE tasks and seeds.

    centralised           one process, each step on the rows that all clients take in it
    sequential            clients one after the other through one trunk (benchmarks/in_turn.py)
    client_batch          all clients' rows in one forward and one backward, one set of adapters, in lockstep
    server_hierarchical   an adapter in the trunk for each client, averaged each round with heads and tails
    plain_fedavg          no split: every client trains the whole model, all is averaged

For each a task's score (the mean of its official metrics, by option scoring), mean and standard deviation over seeds,
seconds of training, and bytes; at the end whether "split equals centralised" is confirmed, by a rule that is printed.

Data: `--data DIR` with a folder a task, `DIR/BoolQ/train.jsonl` and `val.jsonl`, as SuperGLUE is handed round, in the
formats of docs/evaluation.md. Without it shared/data beside the checkout, where there is one. All roles are threads of
this process; `--device` is where the server's trunk lies, where one process trains, and where questions are answered;
clients' parts are computed on the CPU, so that plain FedAvg needs memory for as many whole models as clients there (or
leave it out with --ways). Each figure goes to a file under --out at once; with the same --out a run that was stopped
goes on. With a GPU, for example

    python -m benchmarks.paper --model zai-org/glm-4-9b-hf --data SuperGLUE --tasks rte cb copa boolq wic \\
        --device cuda --method prefix --virtual-tokens 128 --learning-rate 5e-3 --max-length 512 --steps 300 --out paper
"""

import json
import os
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.cells import Cells, Figures
from benchmarks.corpora import choice_task
from benchmarks.paper_runs import METHODS, WAYS, Settings, TaskData, load_task, measure, task_files
from benchmarks.reporting import parser, publish
from benchmarks.shared_data import FOLDER
from benchmarks.tiny_corpora import MAX_LENGTH as TINY_LENGTH
from benchmarks.tiny_corpora import save_model, save_task
from benchmarks.verdicts import RULE, Verdict, overall, verdict
from shared.errors import FlglmError
from shared.model.checkpoint import Checkpoint
from worker_client.client import load_tokenizer

MODEL = FOLDER / "models" / "tinystories-3m" / "hf"
TASKS = ("rte", "cb", "copa")
SEEDS = (0, 1, 2)
# Where tasks lie in shared/data: those with all their training rows before those with 32.
HERE = ("rte_cb_sst2_trec_agnews", "superglue_fewglue32dev")
COPA = FOLDER / "tasks" / "copa_full"
# What the claim is about.
CLAIMED = "client_batch"
SPLIT = ("sequential", "client_batch", "server_hierarchical")
QUICK = {"steps": 4, "local_steps": 2, "batch": 2, "max_length": TINY_LENGTH, "rows": 24, "questions": 8}

Scores = Mapping[tuple[str, str], Sequence[Figures]]


def files_of(name: str, data: Path | None) -> tuple[Path, Path] | None:
    """What to train on and what to measure on; None where either is absent."""
    choice_task(name)
    if data is not None:
        return task_files(data, name)
    if name == "copa" and COPA.is_dir():
        return COPA / "train.jsonl", COPA / "val.jsonl"
    return next((found for folder in HERE if (found := task_files(FOLDER / "tasks" / folder, name))), None)


def skip(message: str) -> None:
    print(f"skipped: {message}", file=sys.stderr)


def arguments_of(words: Sequence[str] | None = None) -> Namespace:
    made = parser("paper", __doc__)
    made.add_argument("--model", default=str(MODEL), help="a folder or hub id")
    made.add_argument("--data", type=Path, help="a folder of tasks")
    made.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    made.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    made.add_argument("--method", choices=METHODS, default="lora")
    made.add_argument("--virtual-tokens", type=int, default=16, help="of --method prefix; FL-GLM has 128")
    made.add_argument("--learning-rate", type=float, default=3e-3)
    made.add_argument("--clients", type=int, default=3)
    made.add_argument("--batch", type=int, default=4, help="rows a client and step")
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--local-steps", type=int, default=5, help="between averages; a divisor of --steps")
    made.add_argument("--max-length", type=int, default=96, help="tokens of a row; prompts lose their beginning")
    made.add_argument("--rows", type=int, default=2500, help="to train on, at most")
    made.add_argument("--questions", type=int, default=200, help="to answer, at most")
    made.add_argument("--out", type=Path, help="where figures are kept and found again")
    read = made.parse_args(words)
    if read.quick:
        read.seeds, read.tasks = [0, 1], ["rte"]
        vars(read).update(QUICK)
    if read.steps % read.local_steps:
        made.error(f"--steps {read.steps}: a multiple of --local-steps {read.local_steps}")
    return read


def settings_of(read: Namespace) -> Settings:
    return Settings(
        model=read.model,
        method=read.method,
        virtual_tokens=read.virtual_tokens,
        learning_rate=read.learning_rate,
        clients=read.clients,
        batch=read.batch,
        steps=read.steps,
        local_steps=read.local_steps,
        max_length=read.max_length,
        rows=read.rows,
        questions=read.questions,
    )


def main(words: Sequence[str] | None = None) -> None:
    read = arguments_of(words)
    threads = max(1, len(os.sched_getaffinity(0)) // (read.clients + 1))
    torch.set_num_threads(threads)
    disable_progress_bar()
    set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        if read.quick:
            read.model, read.data = str(save_model(Path(scratch) / "model")), Path(scratch) / "data"
            save_task(read.data, "rte")
        if read.model == str(MODEL) and not MODEL.is_dir():
            skip("there is no shared/data beside the checkout; name a model with --model")
            return
        try:
            tokenizer = load_tokenizer(Checkpoint(read.model))
            settings = settings_of(read)
            tasks = load_tasks(read, tokenizer, settings)
            if not tasks:
                return
            cells = Cells(
                read.out or Path(scratch) / "figures", asdict(settings) | ({"model": "made up"} if read.quick else {})
            )
            scores = run_all(read, tasks, tokenizer, settings, cells, threads)
        except FlglmError as error:
            print(f"benchmarks.paper: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        report(scores, read.out, as_json=read.json)


def load_tasks(read: Namespace, tokenizer: Any, settings: Settings) -> list[TaskData]:
    tasks = []
    for name in read.tasks:
        files = files_of(name, read.data)
        if files is None:
            skip(f"{name}: no folder {name} with train.* and val.* in {read.data or FOLDER / 'tasks'}")
        else:
            tasks.append(load_task(name, files, tokenizer, settings))
    return tasks


def run_all(
    read: Namespace, tasks: Sequence[TaskData], tokenizer: Any, settings: Settings, cells: Cells, threads: int
) -> dict[tuple[str, str], list[Figures]]:
    """Figures over the seeds, by task and way. Seed by seed, so that a run that was stopped has something of all."""
    scores: dict[tuple[str, str], list[Figures]] = {}
    for seed in read.seeds:
        for data in tasks:
            for name in read.ways:
                figures = cells.figures(
                    f"{data.name} {name} seed {seed}",
                    partial(measure, settings, data, tokenizer, WAYS[name], seed, device=read.device, threads=threads),
                )
                scores.setdefault((data.name, name), []).append(figures)
    return scores


def judged(scores: Scores) -> dict[tuple[str, str], Verdict]:
    """By task and way, of those that split."""
    return {
        (task, way): verdict(
            [each["score"] for each in figures],
            [each["score"] for each in scores[task, "centralised"]],
            figures[0]["blind"],
        )
        for (task, way), figures in scores.items()
        if way != "centralised" and (task, "centralised") in scores
    }


def report(scores: Scores, out: Path | None, *, as_json: bool) -> None:
    verdicts = judged(scores)
    rows, summary = [], {}
    for (task, way), figures in scores.items():
        found = [each["score"] for each in figures]
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        seconds = statistics.mean(each["seconds"] for each in figures)
        up, down = (statistics.mean(each[name] for each in figures) for name in ("bytes_up", "bytes_down"))
        said = verdicts.get((task, way))
        rows.append(
            [
                task,
                way,
                f"{statistics.mean(found):.3f} ± {deviation:.3f}",
                f"{figures[0]['blind']:.3f}",
                f"{seconds:.1f}",
                f"{up / 1e6:,.1f}",
                f"{down / 1e6:,.1f}",
                "" if said is None else f"{said.difference:+.3f} / {said.spread:.3f}: {said.says}",
            ]
        )
        summary[f"{task}, {way}"] = {
            "mean": statistics.mean(found),
            "standard_deviation": deviation,
            "seconds": seconds,
            "bytes_up": up,
            "bytes_down": down,
            "runs": list(figures),
            "against_centralised": None if said is None else asdict(said),
        }
    claims = {
        way: overall(each for (_, mine), each in verdicts.items() if mine == way)
        for way in dict.fromkeys(way for _, way in verdicts)
    }
    document = {"cells": summary, "split_equals_centralised": claims, "rule": RULE}
    columns = ["task", "way", "score", "blind", "seconds", "MB up", "MB down", "less centralised / spread"]
    publish("paper", columns, rows, document, [], as_json=as_json)
    print(RULE, file=sys.stderr)
    for way in (way for way in claims if way in SPLIT):
        print(f"split ({way}) equals centralised within the spread: {claims[way]}", file=sys.stderr)
    if CLAIMED in claims:
        print(f"the claim, of {CLAIMED}: {claims[CLAIMED]}", file=sys.stderr)
    if out is not None:
        (out / "paper.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
