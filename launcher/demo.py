"""The demo: data owners train one model together on this machine, beside each alone and beside one pooled run."""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.baselines import Baseline, train_whole
from launcher.demo_job import default_job, own_data, real_job
from launcher.demo_view import DemoView
from launcher.local_run import VALIDATION_FRACTION, LocalRun, Site, train_together
from launcher.output import Format, emit
from launcher.report import ClientPrivacy, ClientQuality, Curve, Process, Quality, Report, summary_table, write_report
from launcher.whole_models import check_whole
from shared.errors import DataError, JobError
from shared.job import Job, load_job, parse_job
from shared.job.secure import seen_of, why_off
from shared.model.checkpoint import checkpoint_of
from shared.model.families import context_length
from shared.model.methods import longest_row
from shared.model.plan import SplitPlan
from worker_client.client import load_tokenizer
from worker_client.data import Row, load_rows, split_validation
from worker_client.head_tail import NO_SCORE, Score

POOLED = "pooled"


@dataclass(frozen=True)
class DemoSettings:
    """What the command line says."""

    out: Path
    model: str | None = None
    data: Path | None = None
    job: Path | None = None
    steps: int | None = None
    seed: int = 0


def run_demo(settings: DemoSettings, format: Format) -> Report:
    """Run it, print what was gained, write the report. Raises UsageError and what a role's process failed with."""
    out = settings.out
    console = Console(stderr=format is not Format.TXT)
    if (out / "report.json").exists():
        _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    job, sites = _prepare(settings)
    rows = _all_rows(job, sites)
    console.print(f"{len(sites)} clients, {job.total_steps} steps in {job.rounds.count} rounds, one broker, one server")
    if job.handed_in:
        console.print(why_off(job) or f"updates of head and tail are masked: {seen_of(job)}")
    with DemoView(job, [site.name for site in sites], console) as view:

        def watch(name: str, event: dict[str, Any]) -> None:
            view.show(name, event)
            emit(format, {"client": name, **event})

        joint = train_together(job, sites, out, watch)
    baselines = _baselines(job, rows, console)
    report = _report(job, joint, baselines, accuracy=settings.model is None)
    write_report(report, out)
    if format is Format.TXT:
        console.print(summary_table(report))
        console.print(
            f"{report.tokens_per_s:,.0f} tokens/s; on the wire {report.wire_bytes['up'] / 1e6:,.1f} MB up, "
            f"{report.wire_bytes['down'] / 1e6:,.1f} MB down; {report.seconds:.0f} s\n"
            f"report: {out / 'report.html'} (and report.json)"
        )
    return report


# Before: job, data, keys


def _prepare(settings: DemoSettings) -> tuple[Job, list[Site]]:
    """Job file and data owners. An unfinished run with the same settings continues; with others it is refused."""
    out = settings.out
    if settings.model is None:
        if settings.data is not None:
            raise JobError("--data needs --model: the demo's own model knows only its own words")
        model, sites = out / "model", [Site(*site) for site in own_data(out, settings.seed)]
        job = _with(settings, default_job(str(model), len(sites), settings.seed))
    else:
        if settings.data is None:
            raise DataError("--model needs --data", hint="give a folder with one JSONL file a client")
        sites = _sites(settings.data)
        job = _with(settings, real_job(settings.model, len(sites), settings.seed))
    plan = job.split
    SplitPlan(plan.head_blocks, plan.tail_blocks, checkpoint_of(job).config.num_hidden_layers)
    return job, sites


def _with(settings: DemoSettings, job: Job) -> Job:
    """The job file's settings, if one is given, and --steps, over the demo's. Raises JobError, for what plain training
    cannot be compared with too.
    """
    if settings.job is not None:
        clients = job.cohort.clients
        values = load_job(settings.job).model_dump(mode="json")
        values["model_name_or_path"] = job.model_name_or_path
        values["cohort"]["clients"] = clients
        job = parse_job(values, f"{settings.job}, with the demo's {clients} clients")
        check_whole(job)
    if settings.steps is not None:
        local = min(job.rounds.local_steps, settings.steps)
        if settings.steps % local:
            raise JobError(f"--steps {settings.steps} is not a multiple of the {local} steps of a round")
        values = job.model_dump(mode="json")
        values["rounds"] |= {"count": settings.steps // local, "local_steps": local}
        job = parse_job(values, f"{settings.job or 'the demo'}, with --steps {settings.steps}")
    return job


def _sites(folder: Path) -> list[Site]:
    files = sorted(path for path in folder.glob("*.jsonl") if not path.stem.endswith(".validation"))
    if not files:
        raise DataError(f"{folder}: no JSONL file", hint="give a folder with one JSONL file a client")
    return [Site(path.stem, path, _if_there(path.with_suffix(".validation.jsonl"))) for path in files]


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _all_rows(job: Job, sites: list[Site]) -> dict[str, tuple[tuple[Row, ...], tuple[Row, ...]]]:
    """Training and validation rows by site, as the clients will see them. Raises DataError."""
    checkpoint = checkpoint_of(job)
    tokenizer = load_tokenizer(checkpoint)
    limit = longest_row(job, context_length(checkpoint.config))
    rows: dict[str, tuple[tuple[Row, ...], tuple[Row, ...]]] = {}
    for site in sites:
        train = load_rows(site.train, tokenizer, max_length=limit, too_long=job.data.too_long).rows
        if site.validation is None:
            rows[site.name] = split_validation(train, VALIDATION_FRACTION, job.training.seed)
        else:
            held_out = load_rows(site.validation, tokenizer, max_length=limit, too_long=job.data.too_long).rows
            rows[site.name] = (train, held_out)
    return rows


# The comparison


def _baselines(
    job: Job, rows: Mapping[str, tuple[tuple[Row, ...], tuple[Row, ...]]], console: Console
) -> dict[str, Baseline]:
    """Each client alone, and all rows pooled, trained whole in processes of their own."""
    train = {name: mine for name, (mine, _) in rows.items()}
    validation = {name: held_out for name, (_, held_out) in rows.items()}
    runs = {POOLED: train} | {name: {name: mine} for name, mine in train.items()}
    workers = max(1, min(len(runs), os.cpu_count() or 1))
    results: dict[str, Baseline] = {}
    with (
        console.status("for comparison: each alone, and one run on the pooled rows"),
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        futures = {pool.submit(train_whole, job, mine, validation, threads=1): name for name, mine in runs.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            console.print(f"  compared: {futures[future]}")
    return {name: results[name] for name in runs}


def _report(job: Job, joint: LocalRun, baselines: Mapping[str, Baseline], *, accuracy: bool) -> Report:
    """Measured by the share of right diagnoses, or by the loss where answers are free text."""
    names = sorted(joint.events)
    final = {name: _last_score(events) for name, events in joint.events.items()}
    metric = "accuracy" if accuracy else "loss"

    def measure(score: Score) -> float:
        return score.accuracy if accuracy else score.loss

    def overall(scores: Mapping[str, Score]) -> float:
        return measure(sum(scores.values(), start=NO_SCORE))

    pooled = baselines[POOLED].scores
    quality = Quality(
        metric=metric,
        higher_is_better=accuracy,
        joint=overall(final),
        centralised=overall(pooled),
        alone={name: overall(baselines[name].scores) for name in names},
    )
    steps = [event for events in joint.events.values() for event in events if event.get("event") == "step"]
    return Report(
        title="Three hospitals, one model" if accuracy else f"{job.name}: {len(names)} clients, one model",
        metric=metric,
        quality=quality,
        by_client={
            name: ClientQuality(
                joint=measure(final[name]),
                alone=measure(baselines[name].scores[name]),
                centralised=measure(pooled[name]),
            )
            for name in names
        },
        privacy={name: spent for name in names if (spent := _privacy(job, joint.events[name])) is not None},
        curves=_curves(joint, baselines, metric),
        tokens_per_s=_tokens_per_s(joint),
        wire_bytes={"up": joint.bytes_up, "down": joint.bytes_down},
        rounds=job.rounds.count,
        steps=len({event["step"] for event in steps}),
        seconds=joint.seconds,
        processes=[Process(role=p.role, name=p.name, pid=p.pid, exit_code=p.exit_code) for p in joint.processes],
        job=json.loads(job.canonical()),
        versions={
            name: importlib.metadata.version(name) for name in ("flglm", "torch", "transformers", "peft", "pyzmq")
        },
    )


def _tokens_per_s(joint: LocalRun) -> float:
    """All clients' tokens over the time of their steps; in lockstep their clocks run together."""
    rate = 0.0
    for events in joint.events.values():
        steps = [event for event in events if event.get("event") == "step"]
        rate += sum(event["tokens"] for event in steps) / max(1e-9, sum(event["seconds"] for event in steps))
    return rate


def _last_score(events: list[dict[str, Any]]) -> Score:
    last = [event for event in events if event.get("event") == "evaluation"][-1]
    return Score(last["loss"] * last["tokens"], last["tokens"], last["rows"], last["right_rows"])


def _privacy(job: Job, events: list[dict[str, Any]]) -> ClientPrivacy | None:
    spent = [event for event in events if event.get("event") == "privacy_spent"]
    if not spent:
        return None
    last = spent[-1]
    return ClientPrivacy(type=job.privacy.type, rounds=last["rounds"], epsilon=last["epsilon"], delta=last["delta"])


def _curves(joint: LocalRun, baselines: Mapping[str, Baseline], metric: str) -> list[Curve]:
    curves = []
    for name, events in sorted(joint.events.items()):
        steps = {event["step"] + 1: event["loss"] for event in events if event.get("event") == "step"}
        rounds = {event["rounds"]: event[metric] for event in events if event.get("event") == "evaluation"}
        curves.append(Curve(name=name, kind="loss", points=sorted(steps.items())))
        curves.append(Curve(name=name, kind="validation", points=sorted(rounds.items())))
    for name, baseline in baselines.items():
        points: list[tuple[float, float]] = list(enumerate(baseline.losses, start=1))
        curves.append(Curve(name=name, kind="loss", points=points, run="centralised" if name == POOLED else "alone"))
    return curves


def _clear(out: Path) -> None:
    """Remove what a finished demo made in `out`, and nothing else."""
    for name in ("model", "data", "keys", "clients", "server-state", "results", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("job.yaml", "events.jsonl", "report.json", "report.html"):
        (out / name).unlink(missing_ok=True)
