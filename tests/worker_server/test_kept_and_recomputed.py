"""Kept graphs, late members, memory pressure, versions of parameters: the same gradients on every way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_models import save_tiny_model
from shared.job import Cohort, Data, Full, Job, Lora, Method, Prefix, Training
from shared.model.carve import load_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable
from worker_server.kept import Forward, Graph, Rows, release_oldest
from worker_server.trunk import Trunk

WIDTH = 32
METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": Lora(r=4),
    "dropout": Lora(r=4, lora_dropout=0.5),
    "dora": Lora(r=4, use_dora=True),
    "prefix": Prefix(num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


def make_trunk(folder: Path, *, method: Method, adapters: Any = "shared", mode: Any = "greedy") -> Trunk:
    job = Job(
        model_name_or_path=str(folder),
        method=method,
        training=Training(learning_rate=1e-2, max_grad_norm=None),
        data=Data(max_length=20),
        cohort=Cohort(clients=3, adapters=adapters, mode=mode),
    )
    part = load_part(Checkpoint(str(folder)), SplitPlan(1, 1, 4), "trunk")
    make_trainable(part, job)
    trunk = Trunk(part, job)
    torch.manual_seed(5)
    with torch.no_grad():  # LoRA's B begins at zero, and all gradients of A with it
        for name, parameter in trunk.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        if trunk.clients is not None:
            trunk.clients.average.add_(torch.randn_like(trunk.clients.average) * 0.1)
    return trunk


def rows_of(client: str, *lengths: int, targets: int) -> Rows:
    generator = torch.Generator().manual_seed(sum(lengths))
    return Rows(torch.randn(sum(lengths), WIDTH, generator=generator), lengths, targets, True, client)


COHORT = (rows_of("a", 3, 5, targets=6), rows_of("b", 9, targets=2), rows_of("c", 2, 2, 2, targets=4))
GRADIENTS = [torch.randn(rows.hidden.shape, generator=torch.Generator().manual_seed(3)) for rows in COHORT]


def gradients_of(trunk: Trunk) -> dict[str, Tensor]:
    own = {f"client {name}": gradient.clone() for name, gradient in trunk._own.items()}
    return own | {name: p.grad.clone() for name, p in trunk.parameters.items() if p.grad is not None}


def disturb(trunk: Trunk) -> None:
    """Another cohort comes and steps in between, as in greedy mode."""
    other = [rows_of("a", 4, targets=3), rows_of("b", 2, targets=1)]
    outputs = trunk.forward(99, other)
    trunk.backward(99, [output.sign() for output in outputs])
    trunk.step()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def close(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> None:
    for mine, its in zip(one, other, strict=True):
        assert mine is not None
        assert its is not None
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapters", ["shared", "per_client"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("disturbed", [False, True])
def test_a_graph_that_was_let_go_gives_the_same_gradients(
    folder: Path, method: str, adapters: str, disturbed: bool
) -> None:
    """Whatever was stepped in between, with dropout and without."""
    if adapters == "per_client" and method in ("full", "dora"):
        pytest.skip("such jobs are refused")
    kept, released = (make_trunk(folder, method=METHODS[method], adapters=adapters) for _ in range(2))
    released.max_kept_tokens = 0
    results = []
    for trunk in (kept, released):
        torch.manual_seed(1)
        outputs = trunk.forward(0, COHORT)
        assert (trunk.forwards[0].graphs is None) == (trunk is released)
        if disturbed:
            disturb(trunk)
        results.append((outputs, trunk.backward(0, GRADIENTS)))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    same(gradients_of(kept), gradients_of(released))


@pytest.mark.parametrize("method", METHODS)
def test_who_is_late_is_computed_again_as_he_was_computed_first(folder: Path, method: str) -> None:
    """Two backwards of one cohort, with a step between them, against each half of a kept graph."""
    late, kept = (make_trunk(folder, method=METHODS[method]) for _ in range(2))
    halves: list[list[Tensor | None]] = [[GRADIENTS[0], None, GRADIENTS[2]], [None, GRADIENTS[1], None]]
    torch.manual_seed(1)
    late.forward(0, COHORT)
    first = late.backward(0, halves[0], last=False)
    early = gradients_of(late)
    late.step()
    late.optimizer.optimizer.zero_grad()
    second = late.backward(0, halves[1])
    assert late.forwards == {}

    torch.manual_seed(1)
    kept.forward(0, COHORT)
    alone = kept.backward(0, halves[1])
    same(gradients_of(late), gradients_of(kept))
    close([second[1]], [alone[1]])
    kept._forget()
    torch.manual_seed(1)
    kept.forward(0, COHORT)
    others = kept.backward(0, halves[0])
    same(early, gradients_of(kept))
    close([first[0], first[2]], [others[0], others[2]])


def test_a_step_between_forward_and_backward_does_not_reach_into_it(folder: Path) -> None:
    """Against plain autograd, at the parameters that the forward used."""
    trunk, plain = (make_trunk(folder, method=Full()) for _ in range(2))
    trunk.forward(0, COHORT)
    disturb(trunk)
    trunk.backward(0, GRADIENTS)
    plain.part.module.train()
    hidden = torch.cat([rows.hidden for rows in COHORT])
    output = plain.part.forward(hidden, [length for rows in COHORT for length in rows.lengths])
    total = sum(rows.target_tokens for rows in COHORT)
    scaled = [g * (rows.target_tokens / total) for g, rows in zip(GRADIENTS, COHORT, strict=True)]
    torch.autograd.backward(output, torch.cat(scaled))
    same(gradients_of(trunk), gradients_of(plain))


def test_forwards_between_two_steps_share_one_copy_of_the_parameters(folder: Path) -> None:
    trunk = make_trunk(folder, method=Full())
    trunk.forward(0, COHORT[:1])
    trunk.forward(1, COHORT[1:])
    assert trunk.forwards[0].weights is trunk.forwards[1].weights
    trunk.backward(0, GRADIENTS[:1])
    trunk.step()
    trunk.forward(2, COHORT[:1])
    assert trunk.forwards[2].weights is not trunk.forwards[1].weights


def test_in_lockstep_nothing_is_copied(folder: Path) -> None:
    trunk = make_trunk(folder, method=Full(), mode="lockstep")
    trunk.forward(0, COHORT)
    assert trunk.forwards[0].weights is None


@pytest.mark.parametrize("adapters", ["shared", "per_client"])
def test_micro_batches_add_up_to_their_step(folder: Path, adapters: str) -> None:
    """Each with the target tokens of the whole step, against all rows at once."""
    apart, at_once = (make_trunk(folder, method=Lora(r=4), adapters=adapters, mode="lockstep") for _ in range(2))
    micro = [rows_of("a", 3, targets=10), rows_of("a", 5, 4, targets=10)]
    whole = Rows(torch.cat([rows.hidden for rows in micro]), (3, 5, 4), 10, True, "a")
    gradients = [torch.randn(rows.hidden.shape) for rows in micro]
    for number, rows in enumerate(micro):
        apart.forward(number, [rows])
    for number, gradient in enumerate(gradients):
        apart.backward(number, [gradient])
    at_once.forward(0, [whole])
    at_once.backward(0, [torch.cat(gradients)])
    same(gradients_of(apart), gradients_of(at_once))


def test_a_cohort_that_nobody_answers_is_forgotten(folder: Path) -> None:
    trunk = make_trunk(folder, method=Full())
    trunk.forward(0, COHORT)
    assert trunk.backward(0, [None, None, None]) == [None, None, None]
    assert trunk.forwards == {}
    assert gradients_of(trunk) == {}


def test_the_oldest_graphs_go_first_and_no_more_than_must() -> None:
    graph = Graph((0,), torch.zeros(1, 1), torch.zeros(1, 1))
    rows = Rows(torch.zeros(10, 1), (10,), 1, True)
    forwards = {number: Forward((rows,), graphs=[graph]) for number in range(4)}
    assert release_oldest(forwards, 40) == []
    assert release_oldest(forwards, 25) == [0, 1]
    assert [forward.graphs is None for forward in forwards.values()] == [True, True, False, False]
    assert release_oldest(forwards, 20) == []


def test_the_schedule_moves_by_the_share_of_a_step(folder: Path) -> None:
    trunk, whole = (make_trunk(folder, method=Full()) for _ in range(2))
    for _ in range(4):
        trunk.step(0.25)
    whole.step()
    assert trunk.optimizer.steps == whole.optimizer.steps == 1.0
    rates = [each.optimizer.optimizer.param_groups[0]["lr"] for each in (trunk, whole)]
    assert rates[0] == rates[1] < 1e-2


def test_a_bfloat16_trunk_has_float32_adapters_gradients_and_answers(folder: Path) -> None:
    job = Job(model_name_or_path=str(folder), method=Lora(r=4), training=Training(trunk_dtype="bfloat16"))
    part = load_part(Checkpoint(str(folder)), SplitPlan(1, 1, 4), "trunk", dtype=torch.bfloat16)
    make_trainable(part, job)
    trunk, exact = Trunk(part, job), make_trunk(folder, method=Lora(r=4), mode="lockstep")
    assert part.dtype == torch.bfloat16
    assert {p.dtype for p in trunk.parameters.values()} == {torch.float32}
    with torch.no_grad():
        for name, parameter in trunk.parameters.items():
            parameter.copy_(exact.parameters[name])
    for each in (trunk, exact):
        outputs = each.forward(0, COHORT)
        assert {output.dtype for output in outputs} == {torch.float32}
        results = each.backward(0, GRADIENTS)
        assert {result.dtype for result in results if result is not None} == {torch.float32}
    for name, gradient in gradients_of(exact).items():
        difference = (gradients_of(trunk)[name] - gradient).norm() / gradient.norm()
        assert difference < 0.05, name
