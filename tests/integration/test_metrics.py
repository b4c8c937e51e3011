"""The numbers of broker and server after a training run, as Prometheus would read them."""

from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Site, serving, train_one
from shared.job import Rounds, parse_job
from shared.model.checkpoint import checkpoint_of
from worker_client.batches import pack_rows
from worker_client.head_tail import load_client_parts
from worker_client.remote_trunk import RemoteTrunk

NAMES = ("hospital-a", "hospital-b")
STEPS = 3
WAIT_S = 30.0
PURPOSES = ("train", "evaluate", "generate")


def samples(registry: CollectorRegistry) -> dict[str, float]:
    text = generate_latest(registry).decode()
    assert not any(name in text for name in NAMES)
    families = text_string_to_metric_families(text)
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
        found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_what_was_done_is_counted(tmp_path: Path) -> None:
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, len(NAMES)))
    job = job.model_copy(update={"rounds": Rounds(count=2, local_steps=STEPS)})
    with serving(job, tmp_path, NAMES) as running:
        assert not samples(running.running.registry).get("flglm_server_round")
        threads = [
            Background(name, lambda name=name: train_one(running, name, Site(random_rows(8, 0)), tmp_path))
            for name in NAMES
        ]
        for thread in threads:
            thread.join()
        running.service.join()
        server, broker = samples(running.running.registry), samples(running.broker.registry)
        assert not running.running.health.ready
        assert running.broker.health.ready
    forwards = 2 * STEPS
    assert server["flglm_server_round"] == 2
    assert server["flglm_server_rounds_left"] == 0
    assert server["flglm_server_cohorts_total{purpose=train}"] == forwards
    assert server["flglm_server_cohorts_total{purpose=evaluate}"] == 0
    assert server["flglm_server_cohort_requests_sum"] == forwards * len(NAMES)
    assert server["flglm_server_cohort_tokens_total"] > 0
    assert server["flglm_server_wait_seconds_count"] == 2 * forwards * len(NAMES)  # forward and backward
    assert server["flglm_server_compute_seconds_total"] > 0
    assert server["flglm_server_queue_requests"] == 0
    assert server["flglm_server_sessions"] == 0
    assert server["flglm_server_checkpoint_age_seconds"] >= 0
    for direction in ("up", "down"):
        assert broker[f"flglm_broker_messages_total{{direction={direction}}}"] > 0
        assert server[f"flglm_server_bytes_total{{direction={direction}}}"] > 0
    assert broker["flglm_broker_sessions"] == 0
    refusals = {key for key in (*server, *broker) if "refusals_total" in key}
    assert refusals <= {"flglm_broker_refusals_total{code=no_such_server}"}  # clients that came before the server


def test_evaluations_and_generation_are_counted_apart_from_training(tmp_path: Path) -> None:
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 2))
    parts = load_client_parts(checkpoint_of(job), job)
    batch = pack_rows(random_rows(2, 0), 0)
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link, torch.no_grad():
        trunk = RemoteTrunk(link, job, WAIT_S)
        trunk.evaluate(parts.hidden(batch), batch)
        trunk.generate(parts.hidden(batch), batch.lengths, stream=1)
        trunk.generate(parts.hidden(batch), batch.lengths, stream=1)
        server = samples(running.running.registry)
    cohorts = {purpose: server[f"flglm_server_cohorts_total{{purpose={purpose}}}"] for purpose in PURPOSES}
    assert cohorts == {"train": 0, "evaluate": 1, "generate": 2}
    assert server["flglm_server_rounds_left"] == job.rounds.count


def test_plain_fedavg_moves_the_rounds_and_no_cohort(tmp_path: Path) -> None:
    """So an alert on cohorts alone would never be quiet."""
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 1))
    job = parse_job(job.model_dump(mode="json") | {"split": {"trunk": "client"}}, "job")
    seen: list[dict[str, float]] = []
    with serving(job, tmp_path, ["a"]) as running:

        def look(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                seen.append(samples(running.running.registry))

        train_one(running, "a", Site(random_rows(8, 0)), tmp_path, look)
        running.service.join()
        server = samples(running.running.registry)
    assert {sample["flglm_server_sessions"] for sample in seen} == {1}
    assert all(server[f"flglm_server_cohorts_total{{purpose={purpose}}}"] == 0 for purpose in PURPOSES)
    assert (seen[0]["flglm_server_round"], server["flglm_server_round"]) == (0, job.rounds.count)
    assert (seen[0]["flglm_server_rounds_left"], server["flglm_server_rounds_left"]) == (job.rounds.count, 0)


def test_a_refusal_is_counted_by_its_code(tmp_path: Path) -> None:
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 1))
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        running.broker.router.counters["refused_too_fast"] += 2
        assert samples(running.broker.registry)["flglm_broker_refusals_total{code=too_fast}"] == 2
        assert samples(running.running.registry)["flglm_server_sessions"] == 1
        assert link.failure is None
