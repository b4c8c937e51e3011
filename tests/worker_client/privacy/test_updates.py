"""What a client does to its update: clipped exactly, noised as it should be, and nothing that is not finite."""

import math

import pytest
import torch
from torch import Tensor

from shared.job import CentralPrivacy, LocalPrivacy
from worker_client.privacy.updates import clipped, moved, protected


def values(scale: float, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"head": (30, 20), "tail": (50,), "one": ()}
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def norm(differences: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in differences.values()))


START = values(1.0, 1)


@pytest.mark.parametrize("clip_norm", [1e-6, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e6])
def test_the_whole_difference_is_scaled_to_the_norm_and_keeps_its_direction(clip_norm: float, length: float) -> None:
    after = {name: START[name] + value for name, value in values(length).items()}
    exact = {name: after[name].double() - START[name].double() for name in START}
    found = clipped(START, after, clip_norm)
    assert norm(found) <= clip_norm * (1 + 1e-12)
    factor = min(1.0, clip_norm / norm(exact))
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value * factor, rtol=1e-12, atol=0)
    assert (factor == 1) == (norm(exact) <= clip_norm)


def test_who_changed_nothing_hands_in_nothing() -> None:
    assert norm(clipped(START, START, 1.0)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_no_change(bad: float) -> None:
    after = {name: value.clone() for name, value in START.items()}
    after["head"][3, 4] = bad
    assert norm(clipped(START, after, 1.0)) == 0


def test_central_clips_and_leaves_the_noise_to_the_server() -> None:
    privacy = CentralPrivacy(clip_norm=0.5, noise_multiplier=10, delta=1e-5)
    after = {name: START[name] + value for name, value in values(1.0).items()}
    handed_in = moved(START, protected(privacy, START, after))
    assert all(value.dtype == torch.float32 for value in handed_in.values())
    differences = {name: handed_in[name].double() - START[name].double() for name in START}
    assert norm(differences) == pytest.approx(0.5, rel=1e-5)
    within = moved(START, protected(privacy, START, {n: v + 1e-3 for n, v in START.items()}))
    for name, value in START.items():
        torch.testing.assert_close(within[name], value + 1e-3, rtol=3e-7, atol=0)


def test_local_noise_is_on_every_value_that_leaves() -> None:
    """400 draws of 651 values: mean and standard deviation of each and of all, around the clipped difference."""
    privacy = LocalPrivacy(clip_norm=0.5, noise_multiplier=3, delta=1e-5)
    after = {name: START[name] + value for name, value in values(1.0).items()}
    middle = clipped(START, after, 0.5)
    draws = [moved(START, protected(privacy, START, after)) for _ in range(400)]
    for name in START:
        noise = torch.stack([draw[name].double() - START[name].double() for draw in draws]) - middle[name]
        assert float((noise.mean(0).abs() / (1.5 / 20)).max()) < 5
        assert float(noise.std(0).min()) > 1.5 * 0.8
        assert float(noise.std(0).max()) < 1.5 * 1.2
    everything = torch.stack([draw["head"].double() - START["head"].double() for draw in draws]) - middle["head"]
    assert float(everything.std()) == pytest.approx(1.5, rel=0.01)


def test_local_noise_covers_an_update_that_is_not_finite_too() -> None:
    privacy = LocalPrivacy(clip_norm=1.0, noise_multiplier=1, delta=1e-5)
    found = protected(privacy, START, {name: value / 0 for name, value in START.items()})
    assert float(found["head"].double().std()) == pytest.approx(1.0, rel=0.2)
