"""What a slow link costs, and what several batches in flight give back: tokens/s against the same at no delay.

Broker, server and two client processes, sealed, on a random Llama (16 blocks, d = 256), LoRA; one row of 64 tokens a
client and batch. All clients reach the broker through a proxy that delays both directions by half of the round trip.
Delays change from round to round within one run, and each comes back several times. Lockstep: four batches are one
step, so the optimizer's step waits for the last of them on any link; greedy: every batch is a step and nobody waits.
"""

import random
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

from benchmarks.reporting import Goal, parser, publish
from benchmarks.slow_link import SlowLink
from benchmarks.throughput import SIZE, VOCABULARY, write_rows
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from shared.job import Cohort, Data, Job, Lora, Rounds, Training

Mode = Literal["lockstep", "greedy"]

CLIENTS = 2
TOKENS = 64
A_STEP = 4
WINDOWS = (1, 2, 4)


def make_job(model: Path, mode: Mode, in_flight: int, rounds: int, batches: int) -> Job:
    in_lockstep = mode == "lockstep"
    return Job(
        model_name_or_path=str(model),
        method=Lora(),
        training=Training(
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            gradient_accumulation_steps=A_STEP if in_lockstep else 1,
        ),
        data=Data(max_length=TOKENS),
        rounds=Rounds(count=rounds, local_steps=batches // A_STEP if in_lockstep else batches, evaluate_every=rounds),
        cohort=Cohort(clients=CLIENTS, mode=mode, in_flight=in_flight),
    )


def measure(job: Job, data: list[Path], folder: Path, delays: list[float]) -> dict[float, list[float]]:
    """Tokens/s of all clients by round trip in seconds, one a round; the first steps of a round do not count."""
    skip = 1 if job.cohort.mode == "lockstep" else A_STEP
    links: list[SlowLink] = []

    def through(address: str) -> str:
        links.append(SlowLink(address).__enter__())
        return links[0].address

    def watch(_: str, event: dict[str, Any]) -> None:
        if event.get("event") == "round":
            links[0].round_trip_s = delays[event["round"]]

    held_out = folder / "held-out.jsonl"
    held_out.write_text(data[0].read_text().splitlines()[0] + "\n")
    sites = [local_run.Site(path.stem, path, held_out) for path in data]
    try:
        run = local_run.train_together(job, sites, folder / "run", watch, through=through)
    finally:
        for link in links:
            link.__exit__()
    rates: dict[float, list[float]] = defaultdict(list)
    steps = [e for events in run.events.values() for e in events if e.get("event") == "step"]
    for round_, delay in enumerate(delays):
        mine = [e for e in steps if e["round"] == round_ and e["step"] % job.rounds.local_steps >= skip]
        rates[delay].append(CLIENTS * sum(e["tokens"] for e in mine) / sum(e["seconds"] for e in mine))
    return rates


def main() -> None:
    arguments = parser("network", __doc__).parse_args()
    delays, repeats = ([0.0, 0.05], 1) if arguments.quick else ([0.0, 0.02, 0.05, 0.1], 4)
    batches = 16 if arguments.quick else 32
    windows = (1, 4) if arguments.quick else WINDOWS
    modes: tuple[Mode, ...] = ("lockstep", "greedy")
    rates: dict[tuple[Mode, int, float], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model("llama", folder / "model", **SIZE | {"num_hidden_layers": 16})
        save_word_tokenizer(model, VOCABULARY)
        data = [folder / f"site-{index}.jsonl" for index in range(CLIENTS)]
        for index, path in enumerate(data):
            write_rows(path, count=40, ragged=False, seed=index)
        # One round more, whose figures are not used: everything is warm after it.
        order = [0.0] + [
            delay for repeat in range(repeats) for delay in random.Random(repeat).sample(delays, len(delays))
        ]
        for mode in modes:
            for window in windows:
                run = folder / f"{mode}-{window}"
                run.mkdir()
                job = make_job(model, mode, window, len(order), batches)
                for delay, found in measure(job, data, run, order).items():
                    rates[mode, window, delay] = found[1:] if delay == 0.0 else found
                print(f"{mode}, {window} in flight: {medians(rates, mode, window)}", file=sys.stderr)
    report(rates, as_json=arguments.json)


def medians(rates: dict[tuple[Mode, int, float], list[float]], mode: Mode, window: int) -> dict[float, int]:
    return {d: round(statistics.median(v)) for (m, w, d), v in sorted(rates.items()) if (m, w) == (mode, window)}


def report(rates: dict[tuple[Mode, int, float], list[float]], *, as_json: bool) -> None:
    rows, shares = [], {}
    for (mode, window, delay), found in rates.items():
        without = statistics.median(rates[mode, window, 0.0])
        share = statistics.median(found) / without
        shares[f"{mode}_{window}_in_flight_{delay * 1000:.0f}_ms"] = share
        rows.append(
            [
                mode,
                str(window),
                f"{delay * 1000:.0f}",
                f"{statistics.median(found):,.0f}",
                f"{min(found):,.0f} to {max(found):,.0f}",
                f"{share:.2f}",
            ]
        )
    most = max(window for _, window, _ in rates)
    goals = [
        Goal(name, shares[name], 0.9, at_most=False) for name in (f"greedy_{most}_in_flight_50_ms",) if name in shares
    ]
    publish(
        "network",
        ["mode", "in flight", "round trip, ms", "tokens/s", "range", "of that at 0 ms"],
        rows,
        shares | {"tokens_per_s": {f"{m} {w} {d * 1000:.0f} ms": v for (m, w, d), v in rates.items()}},
        goals,
        as_json=as_json,
    )


if __name__ == "__main__":
    main()
