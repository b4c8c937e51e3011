"""What one forward and one backward for all clients gain over serving them one by one, at the trunk alone.

The engine is `worker_server.trunk.Trunk`, without sockets, over the trunk (all but the first and last block) of random
Llamas of 25 and 125 million parameters, LoRA r = 8, fp32. A step is forward, backward and one optimizer step of the
cohort; one by one, the same requests run forward and backward each, and their gradients add up for one optimizer step.
With per-client adapters either way has one optimizer step a client. Rows: ragged (one or two a client, log-normal
lengths of mean 64) or short (as many, of 16 tokens). One thread, processor time, so that other work on the machine
disturbs little; ratios are of neighbouring runs, the order taking turns.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model
from shared.job import Cohort, Job, Training
from shared.model.carve import load_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable
from worker_server.kept import Rows
from worker_server.trunk import Trunk

Kind = Literal["ragged", "short", "per client"]

LONGEST = 256
SHORT = 16
REPEATS = 3
SIZES: dict[str, dict[str, int]] = {
    "25M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "125M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 26_000,
    },
}


def step(trunk: Trunk, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Backward and optimizer step."""
    results = trunk.backward(0, gradients)
    trunk.step()
    return results


@dataclass(frozen=True)
class Case:
    """Processor seconds of each repetition, together and one by one."""

    model: str
    kind: Kind
    clients: int
    tokens: int
    together: list[float]
    one_by_one: list[float]

    @property
    def ratios(self) -> list[float]:
        return [serial / packed for serial, packed in zip(self.one_by_one, self.together, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def make_trunk(folder: Path, adapters: Literal["shared", "per_client"], clients: int) -> Trunk:
    """The middle blocks of the checkpoint in `folder`."""
    job = Job(
        model_name_or_path=str(folder),
        training=Training(learning_rate=1e-4),
        cohort=Cohort(clients=clients, adapters=adapters),
    )
    checkpoint = Checkpoint(str(folder))
    part = load_part(checkpoint, SplitPlan(1, 1, checkpoint.config.num_hidden_layers), "trunk")
    make_trainable(part, job)
    return Trunk(part, job)


def make_cohort(kind: Kind, clients: int, width: int) -> tuple[list[Rows], list[Tensor]]:
    """Each client's hidden states and the gradient that its tail would send; the same for the same arguments."""
    draw = random.Random(1)
    generator = torch.Generator().manual_seed(1)
    cohort = []
    for index in range(clients):
        rows = draw.choice((1, 2))
        lengths = [min(LONGEST, max(4, round(draw.lognormvariate(3.98, 0.6)))) for _ in range(rows)]
        lengths = [SHORT] * rows if kind == "short" else lengths
        hidden = torch.randn(sum(lengths), width, generator=generator)
        cohort.append(Rows(hidden, tuple(lengths), sum(lengths), True, f"client-{index}"))
    return cohort, [torch.randn(rows.hidden.shape, generator=generator) / len(rows.hidden) for rows in cohort]


def run_together(trunk: Trunk, cohort: list[Rows], gradients: list[Tensor]) -> None:
    trunk.forward(0, cohort)
    step(trunk, gradients)


def run_one_by_one(trunk: Trunk, cohort: list[Rows], gradients: list[Tensor]) -> None:
    """The shared adapter: gradients add up, each client's times n_i / N, for one optimizer step."""
    total = sum(rows.target_tokens for rows in cohort)
    trunk.part.module.train()
    for rows, gradient in zip(cohort, gradients, strict=True):
        hidden = rows.hidden.clone().requires_grad_()
        output = trunk.part.forward(hidden, rows.lengths)
        torch.autograd.backward(output, gradient * (rows.target_tokens / total))
    trunk.optimizer.step()


def run_each_alone(trunk: Trunk, cohort: list[Rows], gradients: list[Tensor]) -> None:
    """Per-client adapters: each client's forward, backward and optimizer step."""
    for rows, gradient in zip(cohort, gradients, strict=True):
        trunk.forward(0, [rows])
        step(trunk, [gradient])


def seconds(run: Callable[[Trunk, list[Rows], list[Tensor]], None], *arguments: Any) -> float:
    begin = time.process_time()
    run(*arguments)
    return time.process_time() - begin


def measure(model: str, folder: Path, counts: list[int]) -> list[Case]:
    """All cases of one model, repetition by repetition."""
    width = SIZES[model]["hidden_size"]
    shared, own = (make_trunk(folder, adapters, max(counts)) for adapters in ("shared", "per_client"))
    cases: list[Case] = []
    kinds: tuple[Kind, ...] = ("ragged", "short", "per client")
    for kind in kinds:
        trunk = own if kind == "per client" else shared
        serial = run_each_alone if kind == "per client" else run_one_by_one
        for clients in counts:
            cohort, gradients = make_cohort(kind, clients, width)
            run_together(trunk, cohort[:2], gradients[:2])  # warm up
            cases.append(Case(model, kind, clients, sum(len(rows.hidden) for rows in cohort), [], []))
            case = cases[-1]
            for repeat in range(REPEATS):
                pair = [(run_together, case.together), (serial, case.one_by_one)]
                for run, times in pair if repeat % 2 else reversed(pair):
                    times.append(seconds(run, trunk, cohort, gradients))
            print(f"{model} {kind} {clients}: {case.ratio:.2f}", file=sys.stderr)
    return cases


def main() -> None:
    arguments = parser("batching", __doc__).parse_args()
    torch.set_num_threads(1)
    counts = [1, 4, 16] if arguments.quick else [1, 2, 4, 8, 16, 32]
    models = ["25M"] if arguments.quick else list(SIZES)
    cases: list[Case] = []
    for model in models:
        with tempfile.TemporaryDirectory() as name:
            size: dict[str, Any] = SIZES[model]
            heads = size["num_attention_heads"]
            folder = save_tiny_model(
                "llama",
                Path(name) / "model",
                **size | {"num_key_value_heads": heads, "head_dim": 64, "max_position_embeddings": 2 * LONGEST},
            )
            cases += measure(model, folder, counts)
    report(cases, as_json=arguments.json)


def report(cases: list[Case], *, as_json: bool) -> None:
    def smaller(kind: Kind) -> Case:
        return min((case for case in cases if (case.kind, case.clients) == (kind, 16)), key=lambda case: case.ratio)

    worst = min((case for case in cases if case.clients > 1), key=lambda case: case.ratio)
    at_16 = {
        "ragged_16_clients": (smaller("ragged"), 1.5),
        "short_rows_16_clients": (smaller("short"), 2.2),
        "per_client_adapters_16_clients": (smaller("per client"), 1.4),
        "worst": (worst, 1.0),
    }
    figures: dict[str, Any] = {name: case.ratio for name, (case, _) in at_16.items()}
    figures["of"] = {name: f"{case.model}, {case.kind}, {case.clients} clients" for name, (case, _) in at_16.items()}
    figures["one_client"] = [case.ratio for case in cases if case.clients == 1]
    figures["cases"] = [vars(case) | {"ratio": case.ratio} for case in cases]
    publish(
        "batching",
        ["model", "rows", "clients", "tokens", "together, s", "one by one, s", "ratio", "range"],
        [
            [
                case.model,
                case.kind,
                str(case.clients),
                str(case.tokens),
                f"{statistics.median(case.together):.3f}",
                f"{statistics.median(case.one_by_one):.3f}",
                f"{case.ratio:.2f}",
                f"{min(case.ratios):.2f} to {max(case.ratios):.2f}",
            ]
            for case in cases
        ],
        figures,
        [Goal(name, case.ratio, goal, at_most=False) for name, (case, goal) in at_16.items()],
        as_json=as_json,
    )


if __name__ == "__main__":
    main()
