"""The whole system (broker, server, client processes, sealed) against `transformers.Trainer` with peft on pooled data.

The same random Llama (32 blocks, d = 256), LoRA r = 16 in all three parts, fp32, the same rows and tokens a step, on
the same cores: the Trainer with as many threads as there are cores; in the system each client computes with one
thread, the server with as many as there are cores. Equal rows of 128 tokens, one a client and step, and ragged ones.
Tokens are real ones, padding not counted. The system with one client is split training one client at a time
("sequential").
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from shared.job import Cohort, Data, Job, Lora, Rounds, Training

VOCABULARY = 2_000
LONGEST = 128
WARM_UP_STEPS = 3
CORES = len(os.sched_getaffinity(0))
SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}


def write_rows(path: Path, *, count: int, ragged: bool, seed: int) -> None:
    """Rows of random words: of 127 (and the end token), or of log-normal lengths of mean 64."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        length = min(LONGEST - 1, max(4, round(draw.lognormvariate(3.98, 0.6)))) if ragged else LONGEST - 1
        lines.append(json.dumps({"text": " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(length))}))
    path.write_text("\n".join(lines) + "\n")


def make_job(model: Path, clients: int, steps: int) -> Job:
    return Job(
        model_name_or_path=str(model),
        method=Lora(r=16, lora_alpha=32),
        training=Training(per_device_train_batch_size=1, learning_rate=1e-4),
        data=Data(max_length=LONGEST),
        rounds=Rounds(count=1, local_steps=steps),
        cohort=Cohort(clients=clients),
    )


def system_rate(model: Path, data: Sequence[Path], steps: int, folder: Path) -> float:
    """Tokens/s of all clients after the first steps."""
    job = make_job(model, len(data), steps)
    # One validation row, so that evaluation costs next to nothing; steps alone are timed anyway.
    held_out = folder / "held-out.jsonl"
    held_out.write_text(data[0].read_text().splitlines()[0] + "\n")
    sites = [local_run.Site(path.stem, path, held_out) for path in data]
    run = local_run.train_together(job, sites, folder / "run", server_threads=CORES)
    rate = 0.0
    for events in run.events.values():
        steps_ = [e for e in events if e.get("event") == "step" and e["step"] >= WARM_UP_STEPS]
        rate += sum(e["tokens"] for e in steps_) / sum(e["seconds"] for e in steps_)
    return rate


def trainer_rate(model: Path, data: Sequence[Path], steps: int, folder: Path, *, by_length: bool) -> float:
    """Tokens/s of transformers.Trainer on the pooled rows, in a process of its own."""
    script = Path(__file__).with_name("trainer_process.py")
    words = [str(model), str(folder), str(steps), str(len(data)), str(int(by_length)), *map(str, data)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES), "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), *words], check=True, capture_output=True, text=True, env=environment
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    arguments = parser("throughput", __doc__).parse_args()
    torch.set_num_threads(1)
    counts = [1, 4] if arguments.quick else [1, 2, 4, 8]
    repeats, steps = (1, 8) if arguments.quick else (3, 24)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = SIZE | ({"num_hidden_layers": 8} if arguments.quick else {})
        model = save_tiny_model("llama", folder / "model", **size)
        save_word_tokenizer(model, VOCABULARY)
        for repeat in range(repeats):
            for kind in ("equal", "ragged"):
                data = [folder / f"{kind}-{i}.jsonl" for i in range(max(counts))]
                for index, path in enumerate(data):
                    write_rows(path, count=40, ragged=kind == "ragged", seed=100 * repeat + index)
                for count in counts if kind == "equal" else (1, max(counts)):
                    run = folder / f"{repeat}-{kind}-{count}"
                    run.mkdir()
                    rates.setdefault(f"{kind} system {count}", []).append(system_rate(model, data[:count], steps, run))
                most = data[: max(counts)]
                for by_length in (False, True) if kind == "ragged" else (False,):
                    label = f"{kind} trainer" + (" by length" if by_length else "")
                    rate = trainer_rate(model, most, steps, folder / "trainer", by_length=by_length)
                    rates.setdefault(label, []).append(rate)
                print({key: round(values[-1]) for key, values in rates.items()}, file=sys.stderr)
    report(rates, max(counts), as_json=arguments.json)


def report(rates: dict[str, list[float]], most: int, *, as_json: bool) -> None:
    """Ratios within each repetition, then their median."""

    def ratio(kind: str, against: str) -> float:
        return statistics.median(
            a / b for a, b in zip(rates[f"{kind} system {most}"], rates[f"{kind} {against}"], strict=True)
        )

    figures: dict[str, Any] = {
        f"over_trainer_{most}_clients": ratio("equal", "trainer"),
        f"over_trainer_{most}_clients_ragged": ratio("ragged", "trainer"),
        f"over_trainer_by_length_{most}_clients_ragged": ratio("ragged", "trainer by length"),
        f"over_sequential_{most}_clients": ratio("equal", "system 1"),
        f"over_sequential_{most}_clients_ragged": ratio("ragged", "system 1"),
        "tokens_per_s": rates,
        "cores": CORES,
    }
    rows = [
        [label, f"{statistics.median(values):,.0f}", f"{min(values):,.0f} to {max(values):,.0f}"]
        for label, values in rates.items()
    ]
    goals = [
        Goal(name, figures[name], goal, at_most=False)
        for name, goal in ((f"over_trainer_{most}_clients", 0.95), (f"over_sequential_{most}_clients", 1.6))
    ]
    publish("throughput", ["run", "tokens/s, median", "range"], rows, figures, goals, as_json=as_json)


if __name__ == "__main__":
    main()
