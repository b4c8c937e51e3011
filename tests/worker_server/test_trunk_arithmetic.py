"""The trunk's arithmetic against plain autograd, averages against numpy, and what the server keeps between rounds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.tiny_models import save_tiny_model
from shared.errors import CheckpointError, Refused, TensorError
from shared.job import Cohort, Data, Full, Job, Lora, Training
from shared.model.carve import load_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable
from shared.payload.messages import Backward, Forward, Update
from shared.payload.tensors import encode
from worker_server.aggregation import weighted_mean
from worker_server.intake import Intake
from worker_server.progress import Progress
from worker_server.sessions import Session
from worker_server.trunk import Rows, Trunk

WIDTH = 32


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

    def step() -> None:
        kept.update(gradients_of(trunk))

    trunk.optimizer.step = step  # type: ignore[method-assign]
    return kept


def test_a_cohort_is_one_process_on_the_concatenated_batch(folder: Path) -> None:
    cohort = [rows_of(3, 5, targets=6), rows_of(9, targets=2), rows_of(2, 2, 2, targets=4)]
    trunk = make_trunk(folder)
    kept = keep_gradients(trunk)
    outputs = trunk.forward(cohort)
    # Each client's loss: a mean over its own target tokens of some function of its own outputs.
    leaves = [output.clone().requires_grad_() for output in outputs]
    for leaf, rows in zip(leaves, cohort, strict=True):
        torch.autograd.backward(leaf.square().sum() / rows.target_tokens)
    returned = trunk.backward([leaf.grad for leaf in leaves])

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
    both.forward([here, gone])
    returned = both.backward([gradient, None])
    alone.forward([here])
    (expected,) = alone.backward([gradient])
    assert returned[1] is None
    torch.testing.assert_close(returned[0], expected, rtol=1e-5, atol=1e-7)
    for name in kept_alone:
        torch.testing.assert_close(kept_both[name], kept_alone[name], rtol=1e-5, atol=1e-7)


def test_a_gradient_that_nobody_wants_is_not_made(folder: Path) -> None:
    trunk = make_trunk(folder)
    trunk.forward([rows_of(4, targets=3, wants=False)])
    assert not trunk.graphs[0].hidden.requires_grad
    assert trunk.backward([torch.randn(4, WIDTH)]) == [None]


def test_a_token_budget_changes_the_chunks_and_not_the_gradients(folder: Path) -> None:
    cohort = [rows_of(8, targets=7), rows_of(5, targets=4), rows_of(9, targets=2)]
    kept = []
    for budget in (65_536, 160):
        trunk = make_trunk(folder)
        trunk.max_batch_tokens = budget if budget > 1000 else 13
        kept.append(keep_gradients(trunk))
        outputs = trunk.forward(cohort)
        trunk.backward([output.sign() for output in outputs])
    assert len(trunk._chunks(cohort)) == 2
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
    assert not torch.equal(trunk.forward([rows])[0], trunk.forward([rows])[0])


def test_a_restored_trunk_goes_on_bit_equal(folder: Path) -> None:
    def steps(trunk: Trunk, seeds: range) -> None:
        for seed in seeds:
            outputs = trunk.forward([rows_of(6, targets=5, seed=seed)])
            trunk.backward([output.sign() for output in outputs])

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


def test_the_average_is_weighted() -> None:
    draw = np.random.default_rng(0)
    values = [draw.standard_normal((4, 3)).astype(np.float32) for _ in range(3)]
    weights = [1, 5, 100]
    mean = weighted_mean([(w, {"x": torch.from_numpy(v)}) for w, v in zip(weights, values, strict=True)])
    np.testing.assert_allclose(mean["x"].numpy(), np.average(values, axis=0, weights=weights), rtol=1e-6)
    alone = torch.randn(5)
    assert torch.equal(weighted_mean([(7, {"x": alone})])["x"], alone)


@pytest.mark.parametrize("other", [{"y": torch.zeros(2)}, {"x": torch.zeros(3)}, {}])
def test_updates_that_do_not_match_are_refused(other: dict[str, Tensor]) -> None:
    with pytest.raises(TensorError, match="updates differ"):
        weighted_mean([(1, {"x": torch.zeros(2)}), (1, other)])


# Progress


def progress_of(folder: Path, state: Path, **settings: Any) -> Progress:
    trunk = make_trunk(folder, **settings)
    settings = {"method": Full(), "training": Training(learning_rate=1e-2), "data": Data(max_length=20)} | settings
    job = Job(model_name_or_path=str(folder), **settings)
    return Progress(state, job, Checkpoint(str(folder)).fingerprint(), trunk)


def test_progress_goes_on_at_the_last_round(folder: Path, tmp_path: Path) -> None:
    first = progress_of(folder, tmp_path / "state")
    first.begin()
    first.complete_round({"x": torch.ones(2)})
    again = progress_of(folder, tmp_path / "state")
    again.begin()
    assert again.round == 1
    assert again.averages is not None
    assert torch.equal(again.averages["x"], torch.ones(2))


def test_a_corrupt_last_checkpoint_gives_way_to_the_one_before(folder: Path, tmp_path: Path) -> None:
    first = progress_of(folder, tmp_path / "state")
    first.begin()
    first.complete_round({})
    (tmp_path / "state" / "checkpoint-1" / "state.safetensors").write_bytes(b"torn")
    again = progress_of(folder, tmp_path / "state")
    again.begin()
    assert again.round == 0
    (tmp_path / "state" / "checkpoint-0" / "state.json").write_bytes(b"torn")
    with pytest.raises(CheckpointError):
        progress_of(folder, tmp_path / "state").begin()


def test_checkpoints_of_another_job_or_model_are_refused(folder: Path, tmp_path: Path) -> None:
    progress_of(folder, tmp_path / "state").begin()
    with pytest.raises(CheckpointError, match="another job"):
        progress_of(folder, tmp_path / "state", data=Data(max_length=21)).begin()
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    changed = progress_of(folder, tmp_path / "state")
    changed.fingerprint = Checkpoint(str(other)).fingerprint()
    with pytest.raises(CheckpointError, match="another model"):
        changed.begin()


# Intake

SESSION = Session(b"s" * 16, "anna", None, 0.0)  # type: ignore[arg-type]


def intake() -> Intake:
    job = Job(
        model_name_or_path="m",
        data=Data(max_length=10),
        training=Training(per_device_train_batch_size=1),
        cohort=Cohort(max_batch_tokens=16),
    )
    return Intake(job=job, width=4, max_length=10, update_shapes={"x": (2, 2), "y": (3,)})


def forward(lengths: tuple[int, ...], rows: int, targets: int = 1, width: int = 4) -> tuple[Forward, list[Any]]:
    info, frame = encode("hidden", torch.zeros(rows, width), "float32")
    message = Forward(request=1, purpose="train", lengths=lengths, target_tokens=targets, tensors=(info,))
    return message, [frame]


def test_a_good_forward_becomes_a_ticket() -> None:
    ticket = intake().forward(SESSION, *forward((3, 2), 5))
    assert (ticket.client, ticket.tokens, ticket.weight) == ("anna", 5, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (((10, 7), 17), "too_many_tokens"),
        (((11,), 11), "too_long"),
        (((3,), 3, 4), "target_tokens"),
        (((3,), 4), "tensor"),
        (((3,), 3, 1, 5), "tensor"),
    ],
)
def test_a_forward_out_of_bounds_is_refused(arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises((Refused, TensorError)) as error:
        intake().forward(SESSION, *forward(*arguments))
    assert getattr(error.value, "reason", error.value.code) == reason


def test_a_request_has_its_tensor() -> None:
    with pytest.raises(TensorError, match="one tensor"):
        intake().backward(SESSION, Backward(request=2, forward=1), [])


@pytest.mark.parametrize("names", [["x"], ["x", "y", "z"], ["x", "x"], ["x", "z"]])
def test_an_update_has_exactly_the_jobs_tensors(names: list[str]) -> None:
    encoded = [encode(name, torch.zeros(2, 2) if name == "x" else torch.zeros(3), "float32") for name in names]
    message = Update(request=1, round=0, weight=1, tensors=tuple(info for info, _ in encoded))
    with pytest.raises(TensorError, match="not those of the job"):
        intake().update(SESSION, message, [frame for _, frame in encoded])
