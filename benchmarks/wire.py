"""What the number formats of the wire cost: bytes per token, and held-out loss after 200 steps on MedQuAD.

Three clients (three sources of MedQuAD, question as prompt, answer as completion), the pretrained tinystories-3m, all
weights trained, 4 rows of up to 64 tokens a client and step; the same format for hidden states and gradients. Bytes
are those that the clients' sockets counted in training steps (message and seal included, averages between rounds not);
losses are measured through the same format, on a tenth of each client's rows (100 at most). Ratios are to float32 with
the same seed, which gives the order of the rows. Broker, server and clients are threads of this process.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.reporting import Goal, parser, publish
from benchmarks.shared_data import shared_file
from launcher.in_process import Background, Serving, Site, serving
from shared.job import Cohort, Data, Full, Job, Rounds, Training, Wire, WireFormat
from shared.model.checkpoint import Checkpoint, checkpoint_of
from shared.wire.connection import BrokerConnection
from worker_client import training
from worker_client.client import load_tokenizer
from worker_client.data import Row, split_validation, tokenize
from worker_client.head_tail import load_client_parts
from worker_client.record_files import read_records
from worker_client.remote_trunk import RemoteTrunk

SOURCES = ("4_MPlus_Health_Topics_QA", "5_NIDDK_QA", "6_NINDS_QA")
LONGEST = 64
BATCH = 4
ROUNDS = 10
HELD_OUT_ROWS = 100
TIMEOUT_S = 600.0
GOALS: Mapping[WireFormat, float] = {"int8": 1.005, "int4": 1.01}


@dataclass
class Meter:
    """What one client's socket sent and received in training steps: between step events that follow each other."""

    connection: BrokerConnection
    up: int = 0
    down: int = 0
    tokens: int = 0
    before: tuple[int, int] | None = None

    def saw(self, event: Mapping[str, Any]) -> None:
        if event["event"] != "step":
            self.before = None
            return
        now = (self.connection.bytes_sent, self.connection.bytes_received)
        if self.before is not None:
            self.up += now[0] - self.before[0]
            self.down += now[1] - self.before[1]
            self.tokens += event["tokens"]
        self.before = now


@dataclass
class Measured:
    """Sums over the clients."""

    up: int = 0
    down: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    held_out_tokens: int = 0

    def add(self, meter: Meter, evaluation: Mapping[str, Any]) -> None:
        self.up += meter.up
        self.down += meter.down
        self.tokens += meter.tokens
        self.loss_sum += evaluation["loss"] * evaluation["tokens"]
        self.held_out_tokens += evaluation["tokens"]

    @property
    def loss(self) -> float:
        return self.loss_sum / self.held_out_tokens


def load_sites(model: Path, data: Path, clients: int) -> dict[str, Site]:
    """A site a source."""
    tokenizer = load_tokenizer(Checkpoint(str(model)))
    rows: dict[str, list[Row]] = {source: [] for source in SOURCES[:clients]}
    for _, record in read_records(data):
        if record["source"] in rows:
            # Five characters a token and more: what is cut here would be cut below.
            answer = record["answer"][: 20 * LONGEST]
            row = tokenize({"prompt": record["question"], "completion": answer}, tokenizer)
            row = Row(row.input_ids[:LONGEST], row.counts[:LONGEST])
            if row.target_tokens:
                rows[record["source"]].append(row)
    sites = {}
    for source, mine in rows.items():
        train, held_out = split_validation(mine, 0.1, seed=0)
        sites[source] = Site(train, held_out[:HELD_OUT_ROWS])
    return sites


def make_job(model: Path, wire_format: WireFormat, *, clients: int, steps: int, seed: int) -> Job:
    return Job(
        model_name_or_path=str(model),
        method=Full(),
        training=Training(per_device_train_batch_size=BATCH, learning_rate=2e-3, warmup_ratio=0.1, seed=seed),
        data=Data(max_length=LONGEST),
        rounds=Rounds(count=ROUNDS, local_steps=steps // ROUNDS, evaluate_every=ROUNDS),
        cohort=Cohort(clients=clients, deadline_s=TIMEOUT_S),
        wire=Wire(hidden=wire_format, gradient=wire_format),
    )


def measure(job: Job, sites: Mapping[str, Site], folder: Path) -> Measured:
    """Run the job to its end."""
    measured = Measured()

    def run(running: Serving, name: str, site: Site) -> None:
        parts = load_client_parts(checkpoint_of(job), job)
        with running.link(name) as link:
            meter = Meter(link.connection)
            events: list[dict[str, Any]] = []

            def report(event: dict[str, Any]) -> None:
                meter.saw(event)
                if event["event"] == "evaluation":
                    events.append(event)

            trunk = RemoteTrunk(link, job, TIMEOUT_S)
            training.Training(job, parts, trunk, site.train, site.validation, folder / name, report).run()
        measured.add(meter, events[-1])

    with serving(job, folder, sorted(sites)) as running:
        threads = [Background(name, lambda n=name, s=site: run(running, n, s)) for name, site in sites.items()]
        for thread in threads:
            thread.join()
        running.service.join()
    return measured


def main() -> None:
    arguments = parser("wire", __doc__).parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    model = shared_file("models/tinystories-3m/hf")
    data = shared_file("tasks/medquad/medquad.jsonl")
    formats: Sequence[WireFormat] = ("float32", "int8", "int4") if arguments.quick else get_args(WireFormat)
    clients, steps, seeds = (2, 20, (0,)) if arguments.quick else (3, 200, (0, 1))
    sites = load_sites(model, data, clients)
    runs: dict[WireFormat, list[Measured]] = {wire_format: [] for wire_format in formats}
    for seed in seeds:
        for wire_format in formats:
            began = time.monotonic()
            job = make_job(model, wire_format, clients=clients, steps=steps, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                runs[wire_format].append(measure(job, sites, Path(folder)))
            took = time.monotonic() - began
            print(f"{wire_format} seed {seed}: {runs[wire_format][-1].loss:.4f} ({took:.0f} s)", file=sys.stderr)
    report(runs, steps, as_json=arguments.json)


def report(runs: Mapping[WireFormat, Sequence[Measured]], steps: int, *, as_json: bool) -> None:
    """A format's ratio to float32 within each seed, then the median of them."""
    rows, formats = [], {}
    ratios = {
        wire_format: [mine.loss / plain.loss for mine, plain in zip(measured, runs["float32"], strict=True)]
        for wire_format, measured in runs.items()
    }
    for wire_format, measured in runs.items():
        up, down = measured[0].up / measured[0].tokens, measured[0].down / measured[0].tokens
        formats[wire_format] = {
            "bytes_per_token_up": up,
            "bytes_per_token_down": down,
            "loss": [m.loss for m in measured],
            "loss_over_float32": ratios[wire_format],
        }
        rows.append(
            [
                wire_format,
                f"{up:,.0f}",
                f"{down:,.0f}",
                " ".join(f"{m.loss:.4f}" for m in measured),
                " ".join(f"{100 * (ratio - 1):+.2f} %" for ratio in ratios[wire_format]),
            ]
        )
    publish(
        "wire",
        ["format", "bytes/token up", "bytes/token down", "held-out loss, by seed", "against float32"],
        rows,
        {"formats": formats, "steps": steps},
        [
            Goal(f"{name}_loss_over_float32", statistics.median(ratios[name]), goal, at_most=True)
            for name, goal in GOALS.items()
        ],
        as_json=as_json,
    )


if __name__ == "__main__":
    main()
