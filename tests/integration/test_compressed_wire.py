"""Jobs whose hidden states and gradients travel in 8 or 4 bits: they train, near float32, and are as small as said."""

from pathlib import Path

import pytest
import torch

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Outcome, Site, serving, train_in_process
from shared.job import Job, Wire, WireFormat
from shared.payload.codecs import CODECS
from worker_client.batches import pack_rows
from worker_client.remote_trunk import RemoteTrunk

WIDTH = 32


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 2))


def with_format(job: Job, wire_format: WireFormat) -> Job:
    return job.model_copy(update={"wire": Wire(hidden=wire_format, gradient=wire_format)})


def losses(outcome: Outcome) -> list[float]:
    return [event["loss"] for event in outcome.events if event["event"] == "step"]


@pytest.mark.parametrize(("wire_format", "near"), [("int8", 0.005), ("int4", 0.05)])
def test_a_compressed_job_trains_near_float32(wire_format: WireFormat, near: float, job: Job, tmp_path: Path) -> None:
    sites = {name: Site(random_rows(8, seed)) for seed, name in enumerate(("a", "b"))}
    exact = losses(train_in_process(job, sites, tmp_path / "exact")["a"])
    compressed = losses(train_in_process(with_format(job, wire_format), sites, tmp_path / "near")["a"])
    assert compressed != exact
    assert compressed == pytest.approx(exact, rel=near)
    assert sum(compressed[-5:]) < sum(compressed[:5])


@pytest.mark.parametrize("wire_format", ["int8", "int4"])
def test_frames_on_the_line_are_as_small_as_the_format_says(wire_format: WireFormat, job: Job, tmp_path: Path) -> None:
    batch = pack_rows(random_rows(5, 0))
    job = with_format(job, wire_format)
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        trunk = RemoteTrunk(link, job, 60.0)
        before = link.connection.bytes_sent, link.connection.bytes_received
        trunk.evaluate(torch.randn(batch.tokens, WIDTH), batch)
        sent = link.connection.bytes_sent - before[0]
        received = link.connection.bytes_received - before[1]
    size = CODECS[wire_format].size((batch.tokens, WIDTH))
    assert size < sent < size + 400
    assert size < received < size + 400
