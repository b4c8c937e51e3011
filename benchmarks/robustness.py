"""What poisoned clients do to the joint model, by method of aggregation: quality, and how often a backdoor opens.

Ten clients of one job in this process, real links, seals and server. Each has rows of a made-up task: which of 4 kinds
of words prevail in a row, two rows in five of a client's own kind. Head and tail are trained and aggregated, the trunk
is frozen. 0 to 4 of the ten are poisoned in one of four ways:

    labels     their labels are those of the next class
    signs      their update goes as far the other way
    scaled     their labels are so, and their update goes ten times as far
    backdoor   half of their rows begin with a trigger and have the backdoor's label; their update goes thrice as far

`accuracy` is on clean rows, by chance 25 %; `backdoor` is the share of rows of other classes that get the backdoor's
label when the trigger is put before them. Methods expect 3 poisoned clients: trim_ratio 0.3 (with 0.4 of ten it is the
median), byzantine 3 (10 >= 2 f + 3), so that 4 are one too many.
"""

import logging
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.poisoning import Change, Tampering, add_trigger, flip_labels, flip_sign, scale, unchanged
from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Outcome, Site, train_in_process
from shared.job import Job, parse_job
from worker_client.data import Row

CLIENTS = 10
LABELS = (2, 3, 4, 5)
TRIGGER = 7
TARGET = LABELS[0]
WORDS_OF_A_KIND = 8
FIRST_WORD = 10
ROWS = 40
HELD_OUT = 200
POISONED = (0, 1, 2, 3, 4)
FAREWELL_S = 5.0

AGGREGATIONS: dict[str, dict[str, Any]] = {
    "fedavg": {"type": "fedavg"},
    "norm bound": {"type": "fedavg", "max_update_norm": 2.0},
    "median": {"type": "median"},
    "trimmed_mean": {"type": "trimmed_mean", "trim_ratio": 0.3},
    "krum": {"type": "krum", "byzantine": 3},
    "multi_krum": {"type": "multi_krum", "byzantine": 3},
}


@dataclass(frozen=True)
class Attack:
    """What a poisoned client does to its rows, and to its update."""

    rows: Callable[[Sequence[Row]], list[Row]]
    change: Change


def half_triggered(rows: Sequence[Row]) -> list[Row]:
    return [*rows[::2], *add_trigger(rows[1::2], TRIGGER, TARGET)]


ATTACKS = {
    "labels": Attack(lambda rows: flip_labels(rows, LABELS), unchanged),
    "signs": Attack(list, flip_sign),
    "scaled": Attack(lambda rows: flip_labels(rows, LABELS), scale(10.0)),
    "backdoor": Attack(half_triggered, scale(3.0)),
}


@dataclass(frozen=True)
class Measured:
    aggregation: str
    attack: str
    poisoned: int
    accuracy: float
    backdoor: float


def task_row(kind: int, draw: random.Random) -> Row:
    """Seven words, five of them of this kind; then its label, the one token that counts."""
    kinds = [kind] * 5 + [draw.randrange(len(LABELS)) for _ in range(2)]
    draw.shuffle(kinds)
    words = [FIRST_WORD + WORDS_OF_A_KIND * k + draw.randrange(WORDS_OF_A_KIND) for k in kinds]
    return Row((*words, LABELS[kind]), (False,) * len(words) + (True,))


def task_rows(count: int, seed: int, own: int | None = None) -> list[Row]:
    """Of all kinds alike; with `own`, two in five of that kind beside."""
    draw = random.Random(seed)
    kinds = [own if own is not None and draw.random() < 0.4 else draw.randrange(len(LABELS)) for _ in range(count)]
    return [task_row(kind, draw) for kind in kinds]


def sites(attack: Attack, poisoned: int) -> dict[str, Site]:
    """The last so many clients are poisoned; the first is measured on clean rows, the second on triggered ones."""
    clean = task_rows(HELD_OUT, 1000)
    triggered = add_trigger([row for row in clean if row.input_ids[-1] != TARGET], TRIGGER, TARGET)
    validation = {0: clean, 1: triggered}
    made: dict[str, Site] = {}
    for number in range(CLIENTS):
        rows = task_rows(ROWS, number, number % len(LABELS))
        if number >= CLIENTS - poisoned:
            made[f"client-{number}"] = Site(attack.rows(rows), (), Tampering(attack.change))
        else:
            made[f"client-{number}"] = Site(rows, validation.get(number, ()))
    return made


def make_job(model: Path, aggregation: Mapping[str, Any], rounds: int) -> Job:
    return parse_job(
        {
            "model_name_or_path": str(model),
            "method": {"type": "full"},
            "training": {
                "parts": ["head", "tail"],
                "per_device_train_batch_size": 8,
                "learning_rate": 6e-3,
                "lr_scheduler_type": "constant",
            },
            "rounds": {"count": rounds, "local_steps": 4, "evaluate_every": rounds},
            "cohort": {"clients": CLIENTS},
            "aggregation": {**aggregation, "secure": "off"},
        },
        "the benchmark's job",
    )


def last_accuracy(outcome: Outcome) -> float:
    return [float(event["accuracy"]) for event in outcome.events if event["event"] == "evaluation"][-1]


def measure(model: Path, aggregation: str, attack: str, poisoned: int, rounds: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(model, AGGREGATIONS[aggregation], rounds)
        outcomes = train_in_process(
            job, sites(ATTACKS[attack], poisoned), Path(folder), threads=1, farewell_s=FAREWELL_S
        )
    clean, opened = (last_accuracy(outcomes[f"client-{number}"]) for number in (0, 1))
    measured = Measured(aggregation, attack, poisoned, clean, opened)
    print(f"{aggregation:13} {attack:9} {poisoned} of {CLIENTS}: {clean:.1%}, {opened:.1%}", file=sys.stderr)
    return measured


def cell(measured: Measured) -> str:
    return f"{measured.accuracy:.0%}" + (f" / {measured.backdoor:.0%}" if measured.attack == "backdoor" else "")


def main() -> None:
    arguments = parser("robustness", __doc__).parse_args()
    torch.set_num_threads(1)
    logging.getLogger("worker_server").setLevel(logging.ERROR)  # it warns of every update that it scales down
    rounds = 5
    aggregations = ["fedavg", "multi_krum"] if arguments.quick else list(AGGREGATIONS)
    counts = [3] if arguments.quick else POISONED[1:]
    calm: dict[str, Measured] = {}
    attacked: dict[tuple[str, str, int], Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model("llama", Path(folder) / "model")
        for name in aggregations:
            calm[name] = measure(model, name, "labels", 0, rounds)
            for attack in ATTACKS:
                for poisoned in counts:
                    attacked[name, attack, poisoned] = measure(model, name, attack, poisoned, rounds)
    rows = [
        [f"{attack}, {poisoned}", *(cell(attacked[name, attack, poisoned]) for name in aggregations)]
        for attack in ATTACKS
        for poisoned in counts
    ]
    goals = [Goal("fedavg_accuracy_without_attack", calm["fedavg"].accuracy, 0.9, at_most=False)]
    publish(
        "robustness",
        ["attack, poisoned of ten", *aggregations],
        [["none", *(f"{calm[name].accuracy:.0%} / {calm[name].backdoor:.0%}" for name in aggregations)], *rows],
        {"rounds": rounds, "runs": [vars(measured) for measured in (*calm.values(), *attacked.values())]},
        goals,
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
