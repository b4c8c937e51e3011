"""What sparse and quantised updates cost: held-out loss against dense float32, and bytes up and down a round.

Three clients (three sources of MedQuAD, question as prompt, answer as completion), the pretrained tinystories-3m, plain
FedAvg (`split.trunk: client`), so that all that is trained travels: LoRA in every linear layer, or all weights. 4 rows
of up to 64 tokens a client and step, 5 local steps a round; the same density and number format up and down. "without
memory" forgets what was not sent, at both ends; the product has no such setting. Bytes are those that the clients'
sockets counted from an update to its answer, message and seal included, a round and client; what a client gets when it
joins is not in them. Losses are of what all hold after the last round, on a tenth of each client's rows (100 at most).
Ratios are to dense float32 with the same seed, which gives the order of the rows and LoRA's beginning. Broker, server
and clients are threads of this process.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.reporting import Goal, parser, publish
from benchmarks.shared_data import shared_file
from benchmarks.wire import BATCH, LONGEST, TIMEOUT_S, load_sites
from launcher.in_process import Background, Serving, Site, serving
from shared.error_feedback import Compressed
from shared.job import Cohort, Data, FedAvg, Full, Job, Lora, Method, Rounds, Split, Training, Wire, WireFormat
from shared.model.checkpoint import checkpoint_of
from worker_client.head_tail import load_client_parts
from worker_client.local_trunk import LocalTrunk
from worker_client.remote_trunk import Boundary
from worker_client.training import Training as ClientTraining
from worker_server import engine
from worker_server.telling import Told, tell

LOCAL_STEPS = 5
ROUNDS = 16
LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")
METHODS: Mapping[str, tuple[Method, float]] = {
    "lora": (Lora(r=16, lora_alpha=32, target_modules=LINEAR), 5e-3),
    "full": (Full(), 2e-3),
}


@dataclass(frozen=True)
class Case:
    """How updates and averages travel; `memory`: what is not sent comes later."""

    density: float = 1.0
    wire_format: WireFormat = "float32"
    memory: bool = True

    @property
    def name(self) -> str:
        share = "" if self.density == 1.0 else f"{self.density:g} of "
        return f"{share}{self.wire_format}{'' if self.memory else ', without memory'}"


DENSE = Case()
CASES = (
    DENSE,
    *(Case(density) for density in (0.25, 0.1, 0.05, 0.01)),
    *(Case(density, memory=False) for density in (0.1, 0.01)),
    Case(1.0, "int8"),
    Case(1.0, "int4"),
    Case(1.0, "int4", memory=False),
    Case(0.1, "int8"),
)
QUICK = (DENSE, Case(0.1), Case(1.0, "int8"))
GOALS: Mapping[Case, float] = {
    Case(0.25): 1.01,
    Case(0.1): 1.02,
    Case(1.0, "int8"): 1.005,
    Case(1.0, "int4"): 1.01,
}


@dataclass(frozen=True)
class MeteredTrunk(LocalTrunk):
    """`met`: bytes up and down of each round's end."""

    met: list[tuple[int, int]] = field(default_factory=list)

    def update(self, round: int, weight: int, values: Mapping[str, Tensor]) -> Boundary:
        before = self._counted()
        boundary = super().update(round, weight, values)
        return self._note(before, boundary)

    def update_in_part(self, round: int, weight: int, difference: Compressed) -> Boundary:
        before = self._counted()
        boundary = super().update_in_part(round, weight, difference)
        return self._note(before, boundary)

    def _counted(self) -> tuple[int, int]:
        return self.link.connection.bytes_sent, self.link.connection.bytes_received

    def _note(self, before: tuple[int, int], boundary: Boundary) -> Boundary:
        now = self._counted()
        self.met.append((now[0] - before[0], now[1] - before[1]))
        return boundary


class WithoutMemory(ClientTraining):
    def _compressed(self, values: Mapping[str, Tensor]) -> Compressed | None:
        compressed = super()._compressed(values)
        return None if compressed is None else replace(compressed, unsent={})


def tell_without_memory(
    wire: Wire, start: Mapping[str, Tensor], averages: dict[str, Tensor], unsent: Mapping[str, Tensor]
) -> Told:
    told = tell(wire, start, averages, {})
    return Told(told.values, {}, told.change)


@contextmanager
def server_memory(on: bool) -> Iterator[None]:
    """Whether servers of this process keep what they did not tell."""
    with patch.object(engine, "tell", tell if on else tell_without_memory):
        yield


@dataclass
class Measured:
    """`values`: how many are trained. `up`, `down`: bytes of each client and round; losses summed over the clients."""

    values: int = 0
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    loss_sum: float = 0.0
    tokens: int = 0

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens

    @property
    def bytes_up(self) -> float:
        return statistics.mean(self.up)

    @property
    def bytes_down(self) -> float:
        return statistics.mean(self.down)


def make_job(model: Path, method: str, case: Case, *, clients: int, rounds: int, seed: int) -> Job:
    settings, rate = METHODS[method]
    return Job(
        model_name_or_path=str(model),
        split=Split(trunk="client"),
        method=settings,
        training=Training(per_device_train_batch_size=BATCH, learning_rate=rate, warmup_ratio=0.1, seed=seed),
        data=Data(max_length=LONGEST),
        rounds=Rounds(count=rounds, local_steps=LOCAL_STEPS, evaluate_every=rounds),
        cohort=Cohort(clients=clients, deadline_s=TIMEOUT_S),
        aggregation=FedAvg(secure="off"),
        wire=Wire(
            update=case.wire_format,
            update_density=case.density,
            average=case.wire_format,
            average_density=case.density,
        ),
    )


def measure(job: Job, case: Case, sites: Mapping[str, Site], folder: Path) -> Measured:
    """Run the job to its end."""
    measured = Measured()
    training = ClientTraining if case.memory else WithoutMemory

    def run(running: Serving, name: str, site: Site) -> None:
        parts = load_client_parts(checkpoint_of(job), job)
        assert parts.trunk is not None
        events: list[dict[str, Any]] = []
        with running.link(name) as link:
            trunk = MeteredTrunk(link, job, TIMEOUT_S, parts.trunk)
            training(job, parts, trunk, site.train, site.validation, folder / name, events.append).run()
        last = next(event for event in reversed(events) if event["event"] == "evaluation")
        measured.values = sum(parameter.numel() for parameter in parts.parameters.values())
        measured.up += [up for up, _ in trunk.met]
        measured.down += [down for _, down in trunk.met]
        measured.loss_sum += last["loss"] * last["tokens"]
        measured.tokens += last["tokens"]

    with server_memory(case.memory), serving(job, folder, sorted(sites)) as running:
        threads = [Background(name, lambda n=name, s=site: run(running, n, s)) for name, site in sites.items()]
        for thread in threads:
            thread.join()
        running.service.join()
    return measured


Runs = Mapping[Case, list[Measured]]


def main() -> None:
    options = parser("updates", __doc__)
    options.add_argument("--method", choices=METHODS, default="lora", help="what is trained, and travels")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    model = shared_file("models/tinystories-3m/hf")
    data = shared_file("tasks/medquad/medquad.jsonl")
    clients, rounds, seeds = (2, 2, (0,)) if arguments.quick else (3, ROUNDS, (0, 1))
    cases = QUICK if arguments.quick else CASES
    sites = load_sites(model, data, clients)
    runs: Runs = {case: [] for case in cases}
    for seed in seeds:
        for case in cases:
            began = time.monotonic()
            job = make_job(model, arguments.method, case, clients=clients, rounds=rounds, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                runs[case].append(measure(job, case, sites, Path(folder)))
            took = time.monotonic() - began
            print(f"{case.name}, seed {seed}: {runs[case][-1].loss:.4f} ({took:.0f} s)", file=sys.stderr)
    report(runs, arguments.method, rounds, seeds, as_json=arguments.json)


def report(runs: Runs, method: str, rounds: int, seeds: Sequence[int], *, as_json: bool) -> None:
    """A case's ratio to dense within each seed, then the median of them."""
    rows, figures, goals = [], {}, []
    dense = runs[DENSE]
    for case, measured in runs.items():
        ratios = [mine.loss / plain.loss for mine, plain in zip(measured, dense, strict=True)]
        up, down = measured[0].bytes_up, measured[0].bytes_down
        saved = [dense[0].bytes_up / up, dense[0].bytes_down / down]
        figures[case.name] = {
            "loss": [one.loss for one in measured],
            "loss_over_dense": ratios,
            "bytes_up": up,
            "bytes_down": down,
            "times_fewer_up": saved[0],
            "times_fewer_down": saved[1],
            "values": measured[0].values,
        }
        rows.append(
            [
                case.name,
                " ".join(f"{one.loss:.4f}" for one in measured),
                " ".join(f"{100 * (ratio - 1):+.2f} %" for ratio in ratios),
                f"{up / 1000:,.1f}",
                f"{down / 1000:,.1f}",
                f"{saved[0]:.1f}x / {saved[1]:.1f}x",
            ]
        )
        if case in GOALS:
            name = f"{case.name}: loss over dense"
            goals.append(Goal(name, statistics.median(ratios), GOALS[case], at_most=True))
    publish(
        "updates",
        ["what travels both ways", "held-out loss, by seed", "against dense", "kB up", "kB down", "fewer bytes"],
        rows,
        {"method": method, "cases": figures, "rounds": rounds, "local_steps": LOCAL_STEPS, "seeds": list(seeds)},
        goals,
        as_json=as_json,
    )


if __name__ == "__main__":
    main()
