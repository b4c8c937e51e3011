"""The trunk's arithmetic against plain autograd, and averages against numpy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_models import save_tiny_model
from shared.job import Data, Full, Job, Lora, Training
from shared.model.carve import load_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable
from worker_server.kept import Rows
from worker_server.trunk import Trunk

WIDTH = 32


def step(trunk: Trunk, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Backward and optimizer step."""
    results = trunk.backward(0, gradients)
    trunk.step()
    return results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def make_trunk(folder: Path, **settings: Any) -> Trunk:
    settings = {"method": Full(), "training": Training(learning_rate=1e-2), "data": Data(max_length=20)} | settings
    job = Job(model_name_or_path=str(folder), **settings)
    part = load_part(Checkpoint(str(folder)), SplitPlan(1, 1, 4), "trunk")
    make_trainable(part, job)
    return Trunk(part, job)


def rows_of(*lengths: int, targets: int, seed: int = 0, wants: bool = True) -> Rows:
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    return Rows(torch.randn(sum(lengths), WIDTH, generator=generator), lengths, targets, wants)


def gradients_of(trunk: Trunk) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in trunk.parameters.items() if p.grad is not None}


def keep_gradients(trunk: Trunk) -> dict[str, Tensor]:
    """The gradients that the optimizer was given, instead of a step."""
    kept: dict[str, Tensor] = {}

    def take(steps: float = 1.0) -> None:
        kept.update(gradients_of(trunk))

    trunk.optimizer.step = take  # type: ignore[method-assign]
    return kept


def test_a_cohort_is_one_process_on_the_concatenated_batch(folder: Path) -> None:
    cohort = [rows_of(3, 5, targets=6), rows_of(9, targets=2), rows_of(2, 2, 2, targets=4)]
    trunk = make_trunk(folder)
    kept = keep_gradients(trunk)
    outputs = trunk.forward(0, cohort)
    # Each client's loss: a mean over its own target tokens of some function of its own outputs.
    leaves = [output.clone().requires_grad_() for output in outputs]
    for leaf, rows in zip(leaves, cohort, strict=True):
        torch.autograd.backward(leaf.square().sum() / rows.target_tokens)
    returned = step(trunk, [leaf.grad for leaf in leaves])

    plain = make_trunk(folder)
    plain.part.module.train()
    inputs = [rows.hidden.clone().requires_grad_() for rows in cohort]
    total = sum(rows.target_tokens for rows in cohort)
    losses = [plain.part.forward(x, rows.lengths).square().sum() for x, rows in zip(inputs, cohort, strict=True)]
    torch.autograd.backward(torch.stack(losses).sum() / total)
    for name, gradient in gradients_of(plain).items():
        torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-7)
    for own, x, rows in zip(returned, inputs, cohort, strict=True):
        assert own is not None
        assert x.grad is not None
        torch.testing.assert_close(own, x.grad * total / rows.target_tokens, rtol=1e-4, atol=1e-6)


def test_who_sends_no_gradient_counts_for_nothing(folder: Path) -> None:
    here, gone = rows_of(4, targets=3), rows_of(6, targets=50, seed=1)
    gradient = torch.randn(4, WIDTH)
    both, alone = make_trunk(folder), make_trunk(folder)
    kept_both, kept_alone = keep_gradients(both), keep_gradients(alone)
    both.forward(0, [here, gone])
    returned = step(both, [gradient, None])
    alone.forward(0, [here])
    (expected,) = step(alone, [gradient])
    assert returned[1] is None
    torch.testing.assert_close(returned[0], expected, rtol=1e-5, atol=1e-7)
    for name in kept_alone:
        torch.testing.assert_close(kept_both[name], kept_alone[name], rtol=1e-5, atol=1e-7)


def test_a_gradient_that_nobody_wants_is_not_made(folder: Path) -> None:
    trunk = make_trunk(folder)
    trunk.forward(0, [rows_of(4, targets=3, wants=False)])
    assert not (trunk.forwards[0].graphs or [])[0].hidden.requires_grad
    assert step(trunk, [torch.randn(4, WIDTH)]) == [None]


def test_a_token_budget_changes_the_chunks_and_not_the_gradients(folder: Path) -> None:
    cohort = [rows_of(8, targets=7), rows_of(5, targets=4), rows_of(9, targets=2)]
    kept = []
    for budget in (65_536, 13):
        trunk = make_trunk(folder)
        trunk.piece_tokens = budget
        kept.append(keep_gradients(trunk))
        outputs = trunk.forward(0, cohort)
        step(trunk, [output.sign() for output in outputs])
    assert len(trunk._pieces(cohort, range(3))) == 2
    for name in kept[0]:
        torch.testing.assert_close(kept[0][name], kept[1][name], rtol=1e-4, atol=1e-7)


def test_evaluation_has_no_dropout_no_graph_and_no_effect(folder: Path) -> None:
    trunk = make_trunk(folder, method=Lora(lora_dropout=0.9))
    with torch.no_grad():
        for parameter in trunk.parameters.values():
            parameter.normal_()
    before = {name: value.clone() for name, value in trunk.state().items()}
    rows = rows_of(5, targets=4)
    first, second = trunk.evaluate([rows])[0], trunk.evaluate([rows])[0]
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in trunk.state().items())
    assert not torch.equal(trunk.forward(0, [rows])[0], trunk.forward(0, [rows])[0])


def test_a_restored_trunk_goes_on_bit_equal(folder: Path) -> None:
    def steps(trunk: Trunk, seeds: range) -> None:
        for seed in seeds:
            outputs = trunk.forward(0, [rows_of(6, targets=5, seed=seed)])
            step(trunk, [output.sign() for output in outputs])

    method = Lora(lora_dropout=0.3)
    whole = make_trunk(folder, method=method)
    torch.manual_seed(1)
    steps(whole, range(6))
    first = make_trunk(folder, method=method)
    torch.manual_seed(1)
    steps(first, range(3))
    state = {name: value.clone() for name, value in first.state().items()}
    torch.manual_seed(99)
    second = make_trunk(folder, method=method)
    second.load_state(state, first.optimizer.steps)
    steps(second, range(3, 6))
    expected = whole.state()
    assert all(torch.equal(value, expected[name]) for name, value in second.state().items())


@pytest.mark.parametrize(("hidden", "gradient"), [(3e38, 1.0), (1.0, 3e38), (3e38, None)])
def test_numbers_that_overflow_move_nothing_and_spoil_nobody(
    hidden: float, gradient: float | None, folder: Path
) -> None:
    good = rows_of(5, targets=4)
    bad = Rows(hidden * rows_of(5, targets=4, seed=1).hidden.sign(), (5,), 4, True)
    trunk, calm = make_trunk(folder), make_trunk(folder)
    before = {name: value.detach().clone() for name, value in trunk.parameters.items()}
    expected = calm.forward(0, [good])[0]
    torch.testing.assert_close(trunk.forward(0, [good, bad])[0], expected, rtol=1e-5, atol=1e-6)
    own = step(trunk, [torch.ones(5, WIDTH), None if gradient is None else torch.full((5, WIDTH), gradient)])[0]
    assert own is not None
    assert bool(own.isfinite().all())
    assert all(torch.equal(value, before[name]) for name, value in trunk.parameters.items())
    assert trunk.optimizer.steps == 1
    trunk.forward(0, [good])
    step(trunk, [torch.ones(5, WIDTH)])
    assert not all(torch.equal(value, before[name]) for name, value in trunk.parameters.items())
    assert all(bool(value.isfinite().all()) for value in trunk.parameters.values())
