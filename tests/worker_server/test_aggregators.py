"""Every method of aggregation over 3 rounds against a few lines of plain PyTorch on one long vector."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.job import Job, parse_job
from worker_server.aggregators import METHODS
from worker_server.aggregators.bounding import norm
from worker_server.aggregators.method import Update
from worker_server.round_end import Aggregated, aggregate

SHAPES = {"head.a": (4, 3), "head.b": (), "tail.c": (5,)}
SIZE = 18
WEIGHTS = [5, 1, 14, 3, 3, 3, 3]
ROUNDS = 3

# The vector after a round, from the clients' differences (n, SIZE), their shares (n,), and a dict that lasts.
Plain = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]


def plain_fedavg(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return w + p @ d


def plain_fedavgm(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """torch's own SGD with momentum, on the negative mean difference as the gradient."""
    parameter = torch.nn.Parameter(w.clone())
    parameter.grad = -(p @ d)
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.8)
    if kept:
        optimizer.state[parameter]["momentum_buffer"] = kept["buffer"]
    optimizer.step()
    kept["buffer"] = optimizer.state[parameter]["momentum_buffer"]
    return parameter.detach()


def plain_fedadam(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return _adaptive(w, p @ d, kept, lambda v, g: 0.95 * v + 0.05 * g**2)


def plain_fedyogi(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return _adaptive(w, p @ d, kept, lambda v, g: v - 0.05 * g**2 * torch.sign(v - g**2))


def plain_scaffold(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """What the control variates do lies in `d`; they are compared in tests/integration/test_client_drift.py."""
    return w + 0.7 * (p @ d)


def _adaptive(w: Tensor, g: Tensor, kept: dict[str, Tensor], second: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    kept["m"] = 0.8 * kept.get("m", torch.zeros(SIZE, dtype=torch.float64)) + 0.2 * g
    kept["v"] = second(kept.get("v", torch.full((SIZE,), 0.01**2, dtype=torch.float64)), g)
    return w + 0.1 * kept["m"] / (kept["v"].sqrt() + 0.01)


def plain_fedsgd(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """AdamW by its formulas (arXiv 1711.05101, algorithm 2), clipped to norm 1, the rate falling over ten rounds."""
    t = kept["t"] = kept.get("t", torch.zeros(())) + 1
    gradient = p @ d
    gradient = gradient / gradient.norm().clamp_min(1.0)
    kept["m"] = 0.9 * kept.get("m", torch.zeros_like(w)) + 0.1 * gradient
    kept["v"] = 0.999 * kept.get("v", torch.zeros_like(w)) + 0.001 * gradient**2
    rate = 1e-3 * (11 - t) / 10
    moved = kept["m"] / (1 - 0.9**t) / ((kept["v"] / (1 - 0.999**t)).sqrt() + 1e-8)
    return w * (1 - rate * 0.1) - rate * moved


def plain_median(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return w + torch.quantile(d, 0.5, dim=0)


def plain_trimmed_mean(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """Without the largest and the smallest of each coordinate."""
    return w + (d.sum(0) - d.max(0).values - d.min(0).values) / (len(d) - 2)


def plain_krum(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return w + d[_krum_order(d, 0)[0]]


def plain_krum_of_seven(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return w + d[_krum_order(d, 2)[0]]


def plain_multi_krum(w: Tensor, d: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return w + d[_krum_order(d, 2)[:3]].mean(0)


def _krum_order(d: Tensor, byzantine: int) -> list[int]:
    squared = torch.cdist(d, d, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    # A row's smallest is the distance to itself.
    scores = squared.sort(1).values[:, 1 : len(d) - byzantine - 2 + 1].sum(1)
    return [int(place) for place in scores.argsort()]


ADAPTIVE = {"server_learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}
CASES: dict[str, tuple[dict[str, Any], int, Plain]] = {
    "fedavg": ({"type": "fedavg"}, 3, plain_fedavg),
    "fedavgm": ({"type": "fedavgm", "server_learning_rate": 0.7, "momentum": 0.8}, 3, plain_fedavgm),
    "fedadam": ({"type": "fedadam", **ADAPTIVE}, 3, plain_fedadam),
    "fedyogi": ({"type": "fedyogi", **ADAPTIVE}, 3, plain_fedyogi),
    "fedsgd": ({"type": "fedsgd"}, 3, plain_fedsgd),
    "scaffold": ({"type": "scaffold", "server_learning_rate": 0.7}, 3, plain_scaffold),
    "median": ({"type": "median"}, 3, plain_median),
    "median of 4": ({"type": "median"}, 4, plain_median),
    "trimmed_mean": ({"type": "trimmed_mean", "trim_ratio": 0.34}, 3, plain_trimmed_mean),
    "trimmed_mean of 7": ({"type": "trimmed_mean", "trim_ratio": 0.2}, 7, plain_trimmed_mean),
    "krum": ({"type": "krum", "byzantine": 0}, 3, plain_krum),
    "krum of 7": ({"type": "krum", "byzantine": 2}, 7, plain_krum_of_seven),
    "multi_krum": ({"type": "multi_krum", "byzantine": 2}, 7, plain_multi_krum),
}


def job_of(aggregation: dict[str, Any], clients: int = 3) -> Job:
    aggregation = aggregation | {"secure": "off"}
    values = {"model_name_or_path": "m", "cohort": {"clients": clients}, "aggregation": aggregation}
    training: dict[str, Any] = {"parts": ["head", "tail"]}
    if aggregation["type"] == "scaffold":
        training |= {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": None}
    if aggregation["type"] == "fedsgd":
        training |= {"weight_decay": 0.1}
        values |= {"rounds": {"count": 10, "local_steps": 1}}
    return parse_job(values | {"training": training}, "job")


def tensors(vector: Tensor) -> dict[str, Tensor]:
    sizes = [int(torch.Size(shape).numel()) for shape in SHAPES.values()]
    pieces = torch.split(vector.float(), sizes)
    return {name: piece.view(shape) for (name, shape), piece in zip(SHAPES.items(), pieces, strict=True)}


def vector(values: Any) -> Tensor:
    return torch.cat([values[name].flatten() for name in SHAPES]).double()


def updates_of(trained: Tensor) -> list[Update]:
    """(n, SIZE) values."""
    return [
        Update(f"c{i}", weight, tensors(row)) for i, (weight, row) in enumerate(zip(WEIGHTS, trained, strict=False))
    ]


def trained_from(start: Tensor, clients: int, seed: int) -> Tensor:
    """What so many clients hold after their local steps, (n, SIZE), in float32."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(clients, SIZE, generator=generator, dtype=torch.float64) / 10
    return (start + drift).float().double()


@pytest.mark.parametrize("case", CASES)
def test_three_rounds_are_those_of_plain_pytorch(case: str) -> None:
    settings, clients, plain = CASES[case]
    job = job_of(settings, clients)
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(9)).double()
    result, expected = Aggregated(tensors(start), {}), start
    shares = torch.tensor(WEIGHTS[:clients], dtype=torch.float64)
    shares /= shares.sum()
    kept: dict[str, Tensor] = {}
    for number in range(ROUNDS):
        trained = trained_from(expected, clients, number)
        result = aggregate(job, result.values, updates_of(trained), result.state)
        expected = plain(expected, trained - expected, shares, kept)
        torch.testing.assert_close(vector(result.values), expected, rtol=1e-6, atol=1e-6)
        assert all(value.dtype == torch.float32 for value in result.values.values())


def test_no_method_goes_without_a_case() -> None:
    assert {settings["type"] for settings, _, _ in CASES.values()} == METHODS.keys()


def test_one_client_alone_is_taken_to_the_last_bit() -> None:
    start, mine = torch.randn(SIZE) * 1e6, torch.randn(SIZE)
    result = aggregate(job_of({"type": "fedavg"}, 1), tensors(start), updates_of(mine.unsqueeze(0)), {})
    assert torch.equal(vector(result.values), mine.double())


@pytest.mark.parametrize(
    "case", [name for name, (settings, _, _) in CASES.items() if "krum" in name or "mean" in name or "median" in name]
)
def test_robust_methods_hear_no_weight_and_follow_nobody_away(case: str) -> None:
    """The last client sends 1e6 everywhere, and says that it is worth more than all others."""
    settings, clients, _ = CASES[case]
    job = job_of(settings, clients)
    start = torch.zeros(SIZE).double()
    trained = trained_from(start, clients, 0)
    trained[-1] = 1e6
    updates = updates_of(trained)
    greedy = [*updates[:-1], Update("z", 2**50, updates[-1].values)]
    result = aggregate(job, tensors(start), greedy, {})
    assert float(vector(result.values).abs().max()) < 1
    assert torch.equal(vector(result.values), vector(aggregate(job, tensors(start), updates, {}).values))


@pytest.mark.parametrize("length", [0.5, 1e-3, 1e6])
def test_longer_updates_are_scaled_to_the_bound_and_shorter_ones_left_alone(length: float) -> None:
    job = job_of({"type": "fedavg", "max_update_norm": length})
    start = torch.randn(SIZE).float().double()
    trained = torch.stack([start + 0.01, start - 3, start + torch.randn(SIZE)]).float().double()
    d = trained - start
    shares = torch.tensor(WEIGHTS[:3]).double() / sum(WEIGHTS[:3])
    expected = start + shares @ torch.stack([row * min(1.0, length / float(row.norm())) for row in d])
    result = aggregate(job, tensors(start), updates_of(trained), {})
    torch.testing.assert_close(vector(result.values), expected, rtol=1e-6, atol=1e-7)
    assert result.bounded == int((d.norm(dim=1) > length).sum())
    assert norm(tensors(start), updates_of(trained)[1]) == pytest.approx(float(d[1].norm()))


@pytest.mark.parametrize(
    ("settings", "clients", "came"),
    [
        ({"type": "fedavgm"}, 3, 0),
        ({"type": "median"}, 3, 2),
        ({"type": "trimmed_mean", "trim_ratio": 0.34}, 3, 2),
        ({"type": "krum", "byzantine": 0}, 3, 2),
        ({"type": "multi_krum", "byzantine": 1}, 5, 2),
    ],
)
def test_with_too_few_updates_nothing_changes(settings: dict[str, Any], clients: int, came: int) -> None:
    start, state = tensors(torch.randn(SIZE)), {"momentum/x": torch.ones(2)}
    result = aggregate(job_of(settings, clients), start, updates_of(torch.randn(came, SIZE)), state)
    assert result.values is start
    assert result.state is state


def test_krum_counts_lost_updates_among_the_byzantine() -> None:
    """7 members of which 2 may be byzantine: with one refused, of 6 one may be."""
    start = torch.zeros(SIZE).double()
    trained = trained_from(start, 6, 4)
    result = aggregate(job_of({"type": "krum", "byzantine": 2}, 7), tensors(start), updates_of(trained), {})
    assert torch.equal(vector(result.values), trained[_krum_order(trained, 1)[0]])


def test_an_overflowing_result_is_nobodys() -> None:
    """Each value is finite, and twice the step of the server is not."""
    job = job_of({"type": "fedavgm", "server_learning_rate": 2.0})
    start = tensors(torch.zeros(SIZE))
    result = aggregate(job, start, updates_of(torch.full((3, SIZE), 3e38)), {})
    assert result.values is start
    assert result.state == {}


def states(job: Job, rounds: Sequence[int]) -> list[set[str]]:
    result = Aggregated(tensors(torch.zeros(SIZE)), {})
    seen = []
    for number in rounds:
        result = aggregate(job, result.values, updates_of(trained_from(torch.zeros(SIZE), 3, number)), result.state)
        seen.append(set(result.state))
    return seen


def test_a_state_is_named_by_tensor_and_does_not_grow() -> None:
    first, second = states(job_of({"type": "fedadam"}), range(2))
    assert first == second == {f"{moment}/{name}" for moment in "mv" for name in SHAPES}
    assert states(job_of({"type": "median"}), range(2)) == [set(), set()]
