"""What one forward and one backward for all clients gain over serving them one by one, at the trunk alone.

The engine is `worker_server.trunk.Trunk`, without sockets, over the trunk (all but the first and last block) of random
Llamas of 25 and 125 million parameters, LoRA r = 8. A step is forward, backward and one optimizer step of the cohort;
one by one, the same requests run forward and backward each, and their gradients add up for one optimizer step. With
per-client adapters either way has one optimizer step a client. Generation: after 64 tokens a client, one token of each
at a time through the caches, 16 times. A request is one row: ragged (log-normal lengths of mean 64) or of 16 tokens.
All cores, wall time; together and one by one take turns, and a ratio is of the medians.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.reporting import Goal, parser, publish
from benchmarks.tiny_models import save_tiny_model
from shared.job import Cohort, Job, Training
from shared.model.carve import TRUNK_DTYPES, load_part
from shared.model.checkpoint import Checkpoint
from shared.model.kv_cache import RowCache
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable
from worker_server.kept import Rows
from worker_server.trunk import Trunk

Kind = Literal["ragged", "short", "per client", "ragged, bf16", "generation"]

CORES = len(os.sched_getaffinity(0))
LONGEST = 256
SHORT = 16
PROMPT = 64
NEW_TOKENS = 16
REPEATS = 5
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


@dataclass(frozen=True)
class Case:
    """Seconds of each repetition, together and one by one."""

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
        return statistics.median(self.one_by_one) / statistics.median(self.together)


def make_trunk(folder: Path, kind: Kind, clients: int) -> Trunk:
    """The middle blocks of the checkpoint in `folder`."""
    adapters: Literal["shared", "per_client"] = "per_client" if kind == "per client" else "shared"
    trunk_dtype: Literal["float32", "bfloat16"] = "bfloat16" if kind == "ragged, bf16" else "float32"
    job = Job(
        model_name_or_path=str(folder),
        training=Training(learning_rate=1e-4, trunk_dtype=trunk_dtype),
        cohort=Cohort(clients=clients, adapters=adapters),
    )
    checkpoint = Checkpoint(str(folder))
    plan = SplitPlan(1, 1, checkpoint.config.num_hidden_layers)
    part = load_part(checkpoint, plan, "trunk", dtype=TRUNK_DTYPES[trunk_dtype])
    make_trainable(part, job)
    return Trunk(part, job)


def make_cohort(kind: Kind, clients: int, width: int) -> tuple[list[Rows], list[Tensor]]:
    """Each client's hidden states and the gradient that its tail would send; the same for the same arguments."""
    draw = random.Random(1)
    generator = torch.Generator().manual_seed(1)
    cohort = []
    for index in range(clients):
        length = SHORT if kind == "short" else min(LONGEST, max(4, round(draw.lognormvariate(3.98, 0.6))))
        hidden = torch.randn(length, width, generator=generator)
        cohort.append(Rows(hidden, (length,), length, True, f"client-{index}"))
    return cohort, [torch.randn(rows.hidden.shape, generator=generator) / len(rows.hidden) for rows in cohort]


def run_together(trunk: Trunk, cohort: list[Rows], gradients: list[Tensor]) -> None:
    trunk.forward(0, cohort)
    trunk.backward(0, gradients)
    trunk.step()


def run_one_by_one(trunk: Trunk, cohort: list[Rows], gradients: list[Tensor]) -> None:
    """The shared adapter: gradients add up, each client's times n_i / N, for one optimizer step."""
    total = sum(rows.target_tokens for rows in cohort)
    trunk.part.module.train()
    for rows, gradient in zip(cohort, gradients, strict=True):
        hidden = rows.hidden.clone().requires_grad_()
        output = trunk.part.forward(hidden.to(trunk.dtype), rows.lengths).float()
        torch.autograd.backward(output, gradient * (rows.target_tokens / total))
    trunk.step()


def run_each_alone(trunk: Trunk, cohort: list[Rows], gradients: list[Tensor]) -> None:
    """Per-client adapters: each client's forward, backward and optimizer step."""
    for rows, gradient in zip(cohort, gradients, strict=True):
        run_together(trunk, [rows], [gradient])


def make_streams(trunk: Trunk, clients: int, width: int) -> tuple[list[Rows], list[list[RowCache]]]:
    """Each client's next token, and caches that hold its prompt."""
    generator = torch.Generator().manual_seed(1)
    prompts = [Rows(torch.randn(PROMPT, width, generator=generator), (PROMPT,), 0, False) for _ in range(clients)]
    caches = [[RowCache()] for _ in prompts]
    trunk.generate(prompts, caches)
    tokens = [Rows(torch.randn(1, width, generator=generator), (1,), 0, False) for _ in range(clients)]
    return tokens, caches


def generate_together(trunk: Trunk, cohort: list[Rows], caches: list[list[RowCache]]) -> None:
    for _ in range(NEW_TOKENS):
        trunk.generate(cohort, caches)


def generate_one_by_one(trunk: Trunk, cohort: list[Rows], caches: list[list[RowCache]]) -> None:
    for _ in range(NEW_TOKENS):
        for rows, own in zip(cohort, caches, strict=True):
            trunk.generate([rows], [own])


def seconds(run: Callable[..., None], *arguments: Any) -> float:
    begin = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begin


def measure(model: str, folder: Path, kind: Kind, counts: list[int]) -> list[Case]:
    """All cases of one model and kind, repetition by repetition."""
    width = SIZES[model]["hidden_size"]
    trunk = make_trunk(folder, kind, max(counts))
    cases: list[Case] = []
    for clients in counts:
        case = Case(model, kind, clients, 0, [], [])
        for repeat in range(REPEATS + 1):
            if kind == "generation":
                work: tuple[Any, ...] = make_streams(trunk, clients, width)
                ways: list[tuple[Callable[..., None], list[float]]] = [
                    (generate_together, case.together),
                    (generate_one_by_one, case.one_by_one),
                ]
            else:
                work = make_cohort(kind, clients, width)
                serial = run_each_alone if kind == "per client" else run_one_by_one
                ways = [(run_together, case.together), (serial, case.one_by_one)]
            for run, times in ways if repeat % 2 else reversed(ways):
                if kind == "generation":
                    work = make_streams(trunk, clients, width)
                taken = seconds(run, trunk, *work)
                if repeat:  # the first warms up
                    times.append(taken)
        tokens = sum(len(rows.hidden) for rows in work[0]) * (NEW_TOKENS if kind == "generation" else 1)
        cases.append(replace(case, tokens=tokens))
        print(f"{model} {kind} {clients}: {case.ratio:.2f}", file=sys.stderr)
    return cases


def main() -> None:
    arguments = parser("batching", __doc__).parse_args()
    torch.set_num_threads(CORES)
    counts = [1, 8, 16] if arguments.quick else [1, 2, 4, 8, 16, 32]
    kinds: list[Kind] = ["ragged", "short", "per client", "ragged, bf16", "generation"]
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
            for kind in kinds[:3] + kinds[4:] if arguments.quick else kinds:
                cases += measure(model, folder, kind, counts)
    report(cases, as_json=arguments.json)


def report(cases: list[Case], *, as_json: bool) -> None:
    def smaller(kind: Kind, clients: int) -> list[Case]:
        found = [case for case in cases if (case.kind, case.clients) == (kind, clients)]
        return [min(found, key=lambda case: case.ratio)] if found else []

    worst = min((case for case in cases if case.clients > 1), key=lambda case: case.ratio)
    asked: tuple[tuple[str, Kind, int, float], ...] = (
        ("ragged_16_clients", "ragged", 16, 1.5),
        ("short_rows_16_clients", "short", 16, 2.2),
        ("per_client_adapters_16_clients", "per client", 16, 1.4),
        ("generation_8_clients", "generation", 8, 5.0),
        ("generation_32_clients", "generation", 32, 10.0),
    )
    found = [(name, case, goal) for name, kind, clients, goal in asked for case in smaller(kind, clients)]
    found.append(("worst", worst, 1.0))
    figures: dict[str, Any] = {name: case.ratio for name, case, _ in found}
    figures["of"] = {name: f"{case.model}, {case.kind}, {case.clients} clients" for name, case, _ in found}
    figures["cores"] = CORES
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
        [Goal(name, case.ratio, goal, at_most=False) for name, case, goal in found],
        as_json=as_json,
    )


if __name__ == "__main__":
    main()
