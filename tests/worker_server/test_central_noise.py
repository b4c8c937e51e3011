"""Central noise: on the mean of bounded updates, of the promised size, whatever the server makes of the mean."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.job import Job, parse_job
from worker_server.aggregators.method import Update
from worker_server.central_noise import noised
from worker_server.round_end import aggregate

SHAPES = {"head.a": (40, 30), "tail.lora_A.default.weight": (200,)}
CLIP, MULTIPLIER, CLIENTS = 0.5, 2.0, 4
STD = MULTIPLIER * CLIP / CLIENTS
START = {name: torch.full(shape, 0.25) for name, shape in SHAPES.items()}


def job_of(kind: str = "central", multiplier: float = MULTIPLIER, **aggregation: Any) -> Job:
    privacy = {"type": kind, "clip_norm": CLIP, "noise_multiplier": multiplier, "delta": 1e-5}
    values = {
        "model_name_or_path": "m",
        "cohort": {"clients": CLIENTS},
        "training": {"parts": ["head", "tail"]},
        "rounds": {"weighting": "clients"},
        "aggregation": {"type": "fedavg"} | aggregation,
        "privacy": {"type": "none"} if kind == "none" else privacy,
    }
    return parse_job(values, "job")


def updates_of(length: float) -> list[Update]:
    """Every client's difference has this L2 norm."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for client in range(CLIENTS):
        drift = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        norm = torch.cat([value.flatten() for value in drift.values()]).norm()
        values = {name: START[name] + value * length / norm for name, value in drift.items()}
        found.append(Update(f"c{client}", 1, values))
    return found


def clipped_mean(updates: list[Update], length: float) -> dict[str, Tensor]:
    factor = min(1.0, CLIP / length)
    return {
        name: torch.stack([update.values[name].double() - START[name].double() for update in updates]).mean(0) * factor
        for name in START
    }


@pytest.mark.parametrize("length", [0.2, 5.0])
def test_all_go_on_from_the_clipped_mean_and_noise(length: float) -> None:
    """300 draws: each value's mean is the plain one's, all their standard deviations are the promised one."""
    updates = updates_of(length)
    plain = clipped_mean(updates, length)
    draws = [aggregate(job_of(), START, updates, {}).values for _ in range(300)]
    for name, value in START.items():
        noise = torch.stack([draw[name].double() for draw in draws]) - value.double() - plain[name]
        assert float(noise.std()) == pytest.approx(STD, rel=0.02)
        assert float((noise.mean(0).abs() / (STD / 300**0.5)).max()) < 5
        assert float(noise.std(0).min()) > 0.8 * STD


def test_with_next_to_no_noise_it_is_the_plain_clipped_mean() -> None:
    updates = updates_of(5.0)
    found = aggregate(job_of(multiplier=1e-6), START, updates, {})
    for name, mean in clipped_mean(updates, 5.0).items():
        torch.testing.assert_close(found.values[name].double(), START[name].double() + mean, rtol=0, atol=2e-6)
    assert found.bounded == 0


def test_one_client_moves_the_mean_by_its_bound_at_most() -> None:
    """Zero-out: what remains of the sensitivity that the noise is for, however large its update."""
    updates = updates_of(1e6)
    without = [Update("c0", 1, START), *updates[1:]]
    means = [aggregate(job_of(multiplier=1e-6), START, those, {}).values for those in (updates, without)]
    moved = torch.cat([(means[0][name] - means[1][name]).double().flatten() for name in START])
    assert float(moved.norm()) == pytest.approx(CLIP / CLIENTS, rel=1e-3)


def test_fewer_updates_get_more_noise() -> None:
    draws = [aggregate(job_of(), START, updates_of(0.2)[:1], {}).values["head.a"].double() for _ in range(20)]
    assert float(torch.stack(draws).std(0).mean()) == pytest.approx(STD * CLIENTS, rel=0.05)


def test_a_server_optimizer_steps_from_the_noised_mean() -> None:
    """Momentum 0 and rate 0.5: half the mean, half the noise."""
    job = job_of(type="fedavgm", momentum=0.0, server_learning_rate=0.5)
    draws = torch.stack([aggregate(job, START, updates_of(0.2), {}).values["head.a"].double() for _ in range(50)])
    assert float(draws.std(0).mean()) == pytest.approx(STD / 2, rel=0.05)


def test_the_noise_is_the_operating_systems_and_new_each_time() -> None:
    torch.manual_seed(0)
    one = aggregate(job_of(), START, updates_of(0.2), {}).values
    torch.manual_seed(0)
    other = aggregate(job_of(), START, updates_of(0.2), {}).values
    assert not any(torch.equal(one[name], other[name]) for name in START)
    asked: list[int] = []

    def source(count: int) -> bytes:
        asked.append(count)
        return os.urandom(count)

    mean = {name: value.double() for name, value in START.items()}
    noised(job_of(), mean, CLIENTS, random_bytes=source)
    assert sum(asked) >= 8 * sum(value.numel() for value in START.values())


@pytest.mark.parametrize("kind", ["none", "local"])
def test_elsewhere_the_server_adds_nothing_and_bounds_nothing(kind: str) -> None:
    updates = updates_of(5.0)
    found = aggregate(job_of(kind), START, updates, {})
    for name, value in START.items():
        mean = torch.stack([update.values[name].double() for update in updates]).mean(0)
        torch.testing.assert_close(found.values[name], mean.float(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(found.values[name], value)


def test_what_is_not_trained_gets_no_noise() -> None:
    mean = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    found = noised(job_of(lora="freeze_a"), mean, CLIENTS)
    assert torch.equal(found["tail.lora_A.default.weight"], mean["tail.lora_A.default.weight"])
    assert float(found["head.a"].std()) == pytest.approx(STD, rel=0.1)


def test_where_no_update_came_nothing_changes() -> None:
    assert aggregate(job_of(), START, [], {}).values == START
