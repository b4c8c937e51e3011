"""The noise is normal, of the right size, and nothing but the bytes it is given."""

import hashlib
import math
from collections.abc import Callable

import pytest
import torch

from shared.model import gaussian as module
from shared.model.gaussian import gaussian


def bytes_of(seed: str) -> Callable[[int], bytes]:
    """A source that repeats itself."""
    stream = hashlib.shake_256(seed.encode())
    taken = 0

    def take(count: int) -> bytes:
        nonlocal taken
        taken += count
        return stream.digest(taken)[-count:]

    return take


def test_it_is_normal() -> None:
    """A million numbers: moments, and the shares within 1, 2 and 3 standard deviations."""
    noise = gaussian((1000, 1001), 2.5, bytes_of("a"))
    assert noise.shape == (1000, 1001)
    assert noise.dtype == torch.float64
    scaled = noise.flatten() / 2.5
    assert abs(float(scaled.mean())) < 0.005
    assert abs(float(scaled.square().mean()) - 1) < 0.007
    assert abs(float(scaled.pow(4).mean()) - 3) < 0.07
    for within in (1, 2, 3):
        share = float((scaled.abs() < within).double().mean())
        assert share == pytest.approx(math.erf(within / math.sqrt(2)), abs=0.003)


def test_neighbours_and_halves_are_independent() -> None:
    """The two numbers of a pair lie half a piece apart."""
    noise = gaussian((200_000,), 1.0, bytes_of("b"))
    for shift in (1, 2, 100_000, 100_001):
        assert abs(float((noise[shift:] * noise[:-shift]).mean())) < 0.02


def test_it_follows_from_the_bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one = gaussian((7,), 1.0, bytes_of("c"))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(one, gaussian((7,), 1.0, bytes_of("c")))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one, gaussian((7,), 1.0, bytes_of("d")))
    assert not torch.equal(gaussian((7,), 1.0), gaussian((7,), 1.0))
    monkeypatch.setattr(module, "PIECE", 3)
    assert len(gaussian((7,), 1.0, bytes_of("c"))) == 7


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_least_and_the_greatest_numbers_are_finite(byte: bytes) -> None:
    assert bool(gaussian((5,), 1.0, lambda count: byte * count).isfinite().all())


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert gaussian(shape, 1.0).shape == shape
