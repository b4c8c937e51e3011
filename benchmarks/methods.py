"""Every training method on one client, on three alike and on three that differ, against one process on the same rows.

Held-out loss (and accuracy where options are chosen), bytes, peak memory, floating point operations and seconds, on two
corpora: MedQuAD, whose sources are three institutes, and the tasks RTE, CB and SST-2, a source each. A step takes
the same number of rows whoever trains: BATCH in one process and at one client, a third of it at each of three. Heads
and tails (in plain FedAvg all) are averaged every LOCAL_STEPS, or take one step for all every time (FedSGD). Beside:
one process on the rows that the three take ("centralised"; and how far its losses with SEEDS seeds lie apart, which is
what a gap must be held against), each client by itself, and how much of what clients with different sources lose over
DRIFT times as many local steps each method of aggregation gives back.

All roles are threads of this process, real links and seals between them, but for peak memory: there broker, server and
one client with a third of the batch are processes of their own, for a few steps. Operations are those of the client's
own code on its first batches. Learning rates: benchmarks/method_table.py. Each figure goes to a file under --out at
once; with the same --out a run that was stopped goes on.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks import corpora
from benchmarks.cells import Cells, Figures
from benchmarks.corpora import Corpus, Sizes
from benchmarks.method_report import (
    ALONE,
    ALONE_IID,
    CENTRALISED,
    COLUMNS,
    Found,
    cost_of_sources,
    gap,
    gaps_of,
    given_back,
    picture,
    rows,
)
from benchmarks.method_runs import THREADS, Bench, alone, deal, footprint, joint, make_job, tune, whole
from benchmarks.method_table import (
    BY_SOURCE,
    DRIFT_METHODS,
    FEDAVG,
    FEDSGD,
    FEDSGD_BY_SOURCE,
    FEDSGD_IID,
    IID,
    METHODS,
    SETTINGS,
    SGD,
    SGD_RATES,
    WITH_ADAMW,
    WITH_SGD,
)
from benchmarks.reporting import Goal, parser, publish
from benchmarks.shared_data import shared_file
from benchmarks.tiny_corpora import CORPORA as TINY
from benchmarks.tiny_corpora import save_model
from launcher.html_page import html_page
from shared.errors import FlglmError
from shared.model.checkpoint import Checkpoint
from worker_client.client import load_tokenizer

CORPORA = ("medquad", "tasks")
MEDQUAD_SOURCES = ("4_MPlus_Health_Topics_QA", "5_NIDDK_QA", "6_NINDS_QA")
SIZES = Sizes(train=200, tune=50, test=100)
MAX_LENGTH = {"medquad": 64, "tasks": 96}
BATCH = 12
STEPS, QUICK_STEPS = 60, 4
LOCAL_STEPS, QUICK_LOCAL_STEPS = 5, 2
# So many times the steps between averages, where clients drift.
DRIFT = 2
FOOTPRINT_STEPS = 4
# Of one process: other orders of the rows, other first values of adapters.
SEEDS = 3
QUICK_METHODS = ("lora", "plain_fedavg full")
GOAL = 0.01
# Rounding, grown over all steps.
EXACT = 1e-4
TEMPLATE = Path(__file__).with_name("methods.html")

Aggregations = Mapping[str, Mapping[str, Any]]


def load_corpus(name: str, model: Path) -> Corpus:
    if name == "medquad":
        path = shared_file("tasks/medquad/medquad.jsonl")
        return corpora.medquad(path, MEDQUAD_SOURCES, SIZES, max_length=MAX_LENGTH[name])
    folder = shared_file("tasks/rte_cb_sst2_trec_agnews")
    files = {
        "rte": (folder / "rte" / "train.jsonl", folder / "rte" / "val.jsonl"),
        "cb": (folder / "cb" / "train.jsonl", folder / "cb" / "val.jsonl"),
        "sst2": (folder / "sst2" / "stsa.binary.dev", folder / "sst2" / "stsa.binary.test"),
    }
    return corpora.tasks(files, SIZES, load_tokenizer(Checkpoint(str(model))), max_length=MAX_LENGTH[name])


# Cells


def measure(bench: Bench, methods: Sequence[str], cells: Cells) -> Found:
    """All cells of one corpus, by method and setting."""
    found: dict[tuple[str, str], Figures] = {}
    for name in methods:
        row = METHODS[name]
        base = name.removeprefix("plain_fedavg ")
        shares = {setting: deal(bench.corpus, SETTINGS[setting], bench.seed) for setting in SETTINGS}
        job = make_job(bench, row, 1, batch=bench.batch // 3, steps=FOOTPRINT_STEPS, local_steps=FOOTPRINT_STEPS // 2)
        memory = cells.figures(
            f"{bench.corpus.name} {name} memory", partial(footprint, bench, job, shares[BY_SOURCE]["client-0"])
        )
        for setting, dealt in shares.items():
            each_step: dict[str, Any] = {"local_steps": 1, "aggregation": FEDSGD} if SETTINGS[setting].fedsgd else {}
            job = make_job(bench, row, len(dealt), **each_step)
            figures = cells.figures(f"{bench.corpus.name} {name} {setting}", partial(joint, bench, job, dealt))
            found[name, setting] = figures | (memory if len(dealt) == 3 else {})
        job = make_job(bench, METHODS[base], 3)
        # One process has no trunk to give away: plain FedAvg is compared with the same.
        for setting, run, dealt in (
            (CENTRALISED, whole, shares[IID]),
            (ALONE_IID, alone, {"client-0": shares[IID]["client-0"]}),
            (ALONE, alone, shares[BY_SOURCE]),
        ):
            found[name, setting] = cells.figures(
                f"{bench.corpus.name} {base} {setting}", partial(run, bench, job, dealt)
            )
    return found


def measure_spread(bench: Bench, methods: Sequence[str], cells: Cells) -> dict[str, float]:
    """By method, the standard deviation of centralised training's loss over SEEDS seeds, as a fraction of its mean."""
    spread = {}
    for name in methods:
        base = name.removeprefix("plain_fedavg ")
        dealt = deal(bench.corpus, SETTINGS[IID], bench.seed)
        losses = []
        for more in range(SEEDS):
            label = f"{bench.corpus.name} {base} {CENTRALISED}" + (f", seed {bench.seed + more}" if more else "")
            job = make_job(bench, METHODS[base], 3, training={"seed": bench.seed + more})
            losses.append(cells.figures(label, partial(whole, bench, job, dealt))["loss"])
        spread[name] = stdev(losses) / mean(losses)
    return spread


def measure_unclipped(bench: Bench, methods: Sequence[str], cells: Cells) -> dict[str, float]:
    """By method, the IID gap with FedSGD where neither side clips gradients: split training clips by party (ADR 3), one
    process clips the whole, and nothing else tells them apart."""
    gaps = {}
    for name in (name for name in methods if METHODS[name].trunk == "server"):
        dealt, free = deal(bench.corpus, SETTINGS[IID], bench.seed), {"max_grad_norm": None}
        split = make_job(bench, METHODS[name], 3, local_steps=1, training=free, aggregation=FEDSGD)
        plain = make_job(bench, METHODS[name], 3, training=free)
        losses = [
            cells.figures(f"{bench.corpus.name} {name} {label}, unclipped", partial(run, bench, job, dealt))["loss"]
            for label, run, job in ((FEDSGD_IID, joint, split), (CENTRALISED, whole, plain))
        ]
        gaps[name] = gap(*losses)
    return gaps


def measure_drift(
    bench: Bench, methods: Sequence[str], cells: Cells, with_adamw: Aggregations, with_sgd: Aggregations
) -> dict[str, dict[str, Figures]]:
    """By method and aggregation: `loss`, and of the difference between IID and by source what was `given_back`.

    FedAvg is among either kind, or the kind is empty.
    """
    drift: dict[str, dict[str, Figures]] = {}
    for name in (name for name in DRIFT_METHODS if name in methods):
        sgd = {**SGD, "learning_rate": SGD_RATES[name][bench.corpus.name]}
        for optimizer, training, aggregations in (("AdamW", {}, with_adamw), ("SGD", sgd, with_sgd)):
            if not aggregations:
                continue
            losses = {
                label: _drift_cell(bench, name, setting, cells, f"{label}, {optimizer}", training, aggregation)
                for label, setting, aggregation in (
                    ("fedavg, IID", IID, FEDAVG),
                    *((label, BY_SOURCE, aggregation) for label, aggregation in aggregations.items()),
                )
            }
            iid, fedavg = losses["fedavg, IID"]["loss"], losses["fedavg"]["loss"]
            for label, figures in losses.items():
                back = None if label in ("fedavg", "fedavg, IID") else given_back(iid, fedavg, figures["loss"])
                drift.setdefault(name, {})[f"{label}, {optimizer}"] = figures | {"given_back": back}
    return drift


def _drift_cell(
    bench: Bench,
    name: str,
    setting: str,
    cells: Cells,
    label: str,
    training: Mapping[str, Any],
    aggregation: Mapping[str, Any],
) -> Figures:
    dealt = deal(bench.corpus, SETTINGS[setting], bench.seed)
    local_steps = DRIFT * bench.local_steps
    job = make_job(bench, METHODS[name], 3, local_steps=local_steps, training=training, aggregation=aggregation)
    return cells.figures(f"{bench.corpus.name} {name} drift {label}", partial(joint, bench, job, dealt))


def print_rates(bench: Bench, methods: Sequence[str]) -> None:
    """What benchmarks/method_table.py has, measured again: a line a method, the loss by rate."""
    for name in methods:
        row, corpus = METHODS[name], bench.corpus.name
        if row.trunk == "server":
            print(corpus, name, tune(bench, row, {}, row.rates[corpus]), flush=True)
        if name in DRIFT_METHODS:
            print(corpus, name, "SGD", tune(bench, row, SGD, SGD_RATES[name][corpus]), flush=True)


# The whole


def main(words: Sequence[str] | None = None) -> None:
    made = parser("methods", __doc__)
    made.add_argument("--data", choices=CORPORA, action="append", help="one corpus alone; both by default")
    made.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    made.add_argument("--steps", type=int, help=f"of training; {STEPS} by default")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="where figures are kept and found again, and the picture is put")
    made.add_argument("--tune", action="store_true", help="the grid of learning rates, centralised, and nothing else")
    arguments = made.parse_args(words)
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    set_verbosity_error()
    quick = arguments.quick
    names = arguments.data or CORPORA
    methods = arguments.methods or (QUICK_METHODS if quick else list(METHODS))
    steps = arguments.steps or (QUICK_STEPS if quick else STEPS)
    local = QUICK_LOCAL_STEPS if quick else LOCAL_STEPS
    if steps < 1 or steps % (DRIFT * local):
        made.error(f"--steps {steps}: a multiple of {DRIFT * local}")
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch) / "figures"
        model = save_model(Path(scratch) / "model") if quick else shared_file("models/tinystories-3m/hf")
        benches = [
            Bench(model, TINY[name] if quick else load_corpus(name, model), steps, local, BATCH, arguments.seed)
            for name in names
        ]
        try:
            if arguments.tune:
                for bench in benches:
                    print_rates(bench, methods)
                return
            kept = Cells(
                out, {"steps": steps, "local_steps": local, "seed": arguments.seed, "quick": quick, "batch": BATCH}
            )
            found = {bench.corpus.name: measure(bench, methods, kept) for bench in benches}
            # Nine runs are no quick run, nor are two more of each method.
            spread = {} if quick else {bench.corpus.name: measure_spread(bench, methods, kept) for bench in benches}
            unclipped = {bench.corpus.name: measure_unclipped(bench, methods, kept) for bench in benches}
            tables: tuple[Aggregations, Aggregations] = ({}, WITH_SGD) if quick else (WITH_ADAMW, WITH_SGD)
            drift = {bench.corpus.name: measure_drift(bench, methods, kept, *tables) for bench in benches}
        except FlglmError as error:
            print(f"benchmarks.methods: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        report(found, spread, unclipped, drift, arguments.out, as_json=arguments.json)


def report(
    found: Mapping[str, Found],
    spread: Mapping[str, Mapping[str, float]],
    unclipped: Mapping[str, Mapping[str, float]],
    drift: Mapping[str, Mapping[str, Mapping[str, Figures]]],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    gaps = {corpus: gaps_of(cells, IID) for corpus, cells in found.items()}
    each_step = {
        setting: {corpus: gaps_of(cells, setting) for corpus, cells in found.items()}
        for setting in (FEDSGD_IID, FEDSGD_BY_SOURCE)
    }
    costs = {corpus: cost_of_sources(cells) for corpus, cells in found.items()}
    worst, worst_each_step = _worst(gaps), _worst(each_step[FEDSGD_IID])
    found_unclipped = [abs(each) for by_method in unclipped.values() for each in by_method.values()]
    worst_unclipped = max(found_unclipped, default=None)
    figures = {
        "worst_iid_gap_to_centralised": worst,
        "worst_iid_gap_of_fedsgd": worst_each_step,
        "worst_iid_gap_of_fedsgd_unclipped": worst_unclipped,
        "iid_gap_to_centralised": gaps,
        "spread_of_centralised": spread,
        "gap_of_fedsgd_unclipped": unclipped,
        "gap_of_fedsgd": each_step,
        "loss_by_source_over_iid": costs,
        "aggregation": drift,
        "cells": {
            corpus: {f"{method}, {setting}": each for (method, setting), each in cells.items()}
            for corpus, cells in found.items()
        },
    }
    lines = [[corpus, *row] for corpus, cells in found.items() for row in rows(cells)]
    for corpus, by_method in drift.items():
        for method, by_label in by_method.items():
            for label, each in by_label.items():
                back = each["given_back"]
                said = "" if back is None else f" (gives back {back:.0%})"
                lines.append([corpus, method, f"{label}{said}", *_drift_columns(each)])
    goals = [
        Goal("worst_iid_gap_to_centralised", worst, GOAL, at_most=True),
        Goal("worst_iid_gap_of_fedsgd", worst_each_step, GOAL, at_most=True),
    ]
    if worst_unclipped is not None:
        goals.append(Goal("worst_iid_gap_of_fedsgd_unclipped", worst_unclipped, EXACT, at_most=True))
    publish("methods", ["data", *COLUMNS], lines, figures, goals, as_json=as_json)
    for corpus in found:
        of = spread.get(corpus, {})
        told = ", ".join(
            f"{method} {gaps[corpus][method]:+.2%}{f' ({of[method]:.2%})' if method in of else ''}, "
            f"{each_step[FEDSGD_IID][corpus][method]:+.2%} / {cost:.3f}"
            for method, cost in costs[corpus].items()
        )
        print(
            f"{corpus}: IID over centralised with FedAvg (its own standard deviation over seeds), with FedSGD / by "
            f"source over IID: {told}",
            file=sys.stderr,
        )
    if out is not None:
        pictures = "".join(
            f'<section class="card"><h2>{escape(corpus)}</h2>{picture(cells, corpus)}</section>'
            for corpus, cells in found.items()
        )
        exact = "" if worst_unclipped is None else f", {worst_unclipped:.0e} where nobody clips gradients"
        summary = (
            f"The largest gap of three IID clients to one process: {worst:+.2%} with FedAvg every {LOCAL_STEPS} steps, "
            f"{worst_each_step:+.2%} with FedSGD{exact}."
        )
        (out / "methods.html").write_text(html_page("benchmarks.methods", TEMPLATE, summary=summary, pictures=pictures))
        (out / "methods.json").write_text(json.dumps(figures, indent=1) + "\n")


def _worst(gaps: Mapping[str, Mapping[str, float]]) -> float:
    return max(each for by_method in gaps.values() for each in by_method.values())


def _drift_columns(each: Figures) -> list[str]:
    accuracy = f"{each['accuracy']:.1%}" if "accuracy" in each else ""
    return [f"{each['loss']:.4f}", accuracy, "", "", "", "", f"{each['seconds']:.0f}"]


if __name__ == "__main__":
    main()
