"""Where a step's time goes: the model (head, tail, trunk, their optimizers), and what only a split system needs.

One client, a random Llama of 125 M parameters, LoRA, fp32, 8 rows of 128 tokens; broker, server and client are threads
of this process with real sealing between them. With one client nothing overlaps, so a step is the sum of its parts:
"sockets and waiting" is what is left of it.
"""

import random
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import broker.routing
import shared.secure.records
import worker_client.remote_trunk
import worker_server.intake
import worker_server.service
import worker_server.trunk
from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Site, train_in_process
from shared.job import Cohort, Data, Job, Lora, Rounds, Training
from worker_client.data import Row

VOCABULARY = 8_000
TOKENS = 128
ROWS = 8
SIZE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
QUICK_SIZE = SIZE | {"num_hidden_layers": 4}
SPLIT_ONLY = ("codec", "sealing", "broker")
# What is timed: label, owner, name of the function there.
TIMED: list[tuple[str, Any, str]] = [
    ("trunk", worker_server.trunk.Trunk, "forward"),
    ("trunk", worker_server.trunk.Trunk, "backward"),
    ("codec", worker_client.remote_trunk, "encode"),
    ("codec", worker_client.remote_trunk, "decode"),
    ("codec", worker_server.service, "encode"),
    ("codec", worker_server.intake, "decode"),
    ("sealing", shared.secure.records.Channel, "seal"),
    ("sealing", shared.secure.records.Channel, "open"),
    ("broker", broker.routing.Router, "handle"),
]


class Clock:
    """Seconds by label, added up over all threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.lock = threading.Lock()

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                with self.lock:
                    self.seconds[label] += time.perf_counter() - began

        return call


@contextmanager
def measuring(clock: Clock) -> Iterator[None]:
    """Let the functions of TIMED run under the clock."""
    before = [(label, owner, name, getattr(owner, name)) for label, owner, name in TIMED]
    try:
        for label, owner, name, function in before:
            setattr(owner, name, clock.timed(label, function))
        yield
    finally:
        for _, owner, name, function in before:
            setattr(owner, name, function)


def measure(model: Path, steps: int, folder: Path, seed: int) -> dict[str, float]:
    """Seconds by part, and "step" for all of it, summed over the steps of one run."""
    draw = random.Random(seed)
    rows = [Row(tuple(draw.randrange(2, VOCABULARY) for _ in range(TOKENS)), (True,) * TOKENS) for _ in range(4 * ROWS)]
    job = Job(
        model_name_or_path=str(model),
        method=Lora(r=16),
        training=Training(per_device_train_batch_size=ROWS),
        data=Data(max_length=TOKENS),
        rounds=Rounds(count=1, local_steps=steps),
        cohort=Cohort(clients=1),
    )
    clock = Clock()
    with measuring(clock):
        outcome = train_in_process(job, {"a": Site(rows)}, folder)["a"]
    done = [event for event in outcome.events if event["event"] == "step"]
    step, waited = sum(event["seconds"] for event in done), sum(event["waited_s"] for event in done)
    parts = {"step": step, "head and tail": step - waited} | dict(clock.seconds)
    parts["sockets and waiting"] = waited - sum(clock.seconds.values())
    return parts


def main() -> None:
    arguments = parser("overhead", __doc__).parse_args()
    runs, steps = (1, 3) if arguments.quick else (3, 6)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model("llama", folder / "model", **(QUICK_SIZE if arguments.quick else SIZE))
        measured = [measure(model, steps, folder / str(seed), seed) for seed in range(runs)]
    labels = ["head and tail", "trunk", *SPLIT_ONLY, "sockets and waiting"]
    shares = {label: [run[label] / run["step"] for run in measured] for label in labels}
    not_model = [1 - (run["head and tail"] + run["trunk"]) / run["step"] for run in measured]
    share = statistics.median(not_model)
    publish(
        "overhead",
        ["part of a step", "ms, median", "share, median", "range"],
        [
            [
                label,
                f"{1000 * statistics.median(run[label] / steps for run in measured):,.1f}",
                f"{statistics.median(values):.2%}",
                f"{min(values):.2%} to {max(values):.2%}",
            ]
            for label, values in shares.items()
        ],
        {"share_not_model": share, "share_not_model_by_run": not_model, "shares": shares},
        [Goal("share_not_model", share, 0.05, at_most=True)],
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
