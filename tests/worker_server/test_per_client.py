"""Per-client adapters in one packed cohort against as many trunks, each with one client and an adapter of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.tiny_models import save_tiny_model
from shared.errors import JobError
from shared.job import Cohort, Job, Lora, Method, Prefix, Training, parse_job
from shared.model.carve import load_part
from shared.model.checkpoint import Checkpoint
from shared.model.kv_cache import RowCache
from shared.model.optimizer import PartOptimizer
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable
from worker_server.aggregators.fedavg import weighted_mean
from worker_server.aggregators.method import Update
from worker_server.kept import Rows
from worker_server.no_trunk import NoTrunk
from worker_server.per_client import tiling
from worker_server.progress import Progress
from worker_server.trunk import Trunk

WIDTH = 32
NAMES = ("a", "b", "c")
LENGTHS = ((3, 40), (7,), (2, 2, 31))
PREFIX = {"num_virtual_tokens": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def job_of(folder: Path, cohort: Cohort, **method: Any) -> Job:
    """With a prefix if `method` names virtual tokens, else with LoRA."""
    settings: Method = Prefix(**method) if "num_virtual_tokens" in method else Lora(r=3, lora_alpha=5, **method)
    return Job(
        model_name_or_path=str(folder),
        method=settings,
        training=Training(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5),
        cohort=cohort,
    )


def make_trunk(folder: Path, *, clients: int = len(NAMES), **method: Any) -> Trunk:
    """With per-client adapters."""
    return _trunk(folder, job_of(folder, Cohort(clients=clients, adapters="per_client"), **method))


def make_alone(folder: Path, **method: Any) -> Trunk:
    """A server for one client, with the shared adapter."""
    return _trunk(folder, job_of(folder, Cohort(), **method))


def _trunk(folder: Path, job: Job) -> Trunk:
    part = load_part(Checkpoint(str(folder)), SplitPlan(1, 1, 4), "trunk")
    make_trainable(part, job)
    return Trunk(part, job)


def rows_of(name: str, step: int, lengths: tuple[int, ...] | None = None) -> Rows:
    place = NAMES.index(name)
    lengths = lengths or LENGTHS[(place + step) % len(LENGTHS)]
    generator = torch.Generator().manual_seed(10 * step + place)
    return Rows(torch.randn(sum(lengths), WIDTH, generator=generator), lengths, sum(lengths) - place, True, name)


def gradient_of(output: Tensor, rows: Rows) -> Tensor:
    """Of the mean over the client's target tokens of some function of the trunk's output."""
    leaf = output.clone().requires_grad_()
    torch.autograd.backward(leaf.square().sum() / rows.target_tokens)
    assert leaf.grad is not None
    return leaf.grad


def step(trunk: Trunk, cohort: Sequence[Rows], *, absent: Sequence[str] = ()) -> list[Tensor | None]:
    """One training step; outputs and, where one came, gradients at the trunk's input."""
    outputs = trunk.forward(0, cohort)
    pairs = list(zip(outputs, cohort, strict=True))
    gradients = trunk.backward(0, [None if rows.client in absent else gradient_of(o, rows) for o, rows in pairs])
    trunk.step()
    return [*outputs, *gradients]


def vectors(trunk: Trunk) -> dict[str, Tensor]:
    assert trunk.clients is not None
    return {name: adapter.vector.detach().clone() for name, adapter in trunk.clients.clients.items()}


def in_order(trunk: Trunk, alone: Trunk) -> Tensor:
    """The lone trunk's adapter in the order of the other's vectors."""
    assert trunk.clients is not None
    return torch.cat([alone.parameters[name].detach().flatten() for name in trunk.clients.shapes])


def end_round(trunk: Trunk, weights: dict[str, int]) -> None:
    """As the engine ends it, with FedAvg."""
    start = trunk.own_start()
    mean = weighted_mean(trunk.job, start, [Update(name, w, trunk.own_values(name)) for name, w in weights.items()])
    trunk.end_round({name: (value.double() + mean[name]).float() for name, value in start.items()})


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("phi3", {}),
        ("llama", {"use_rslora": True}),
        ("llama", PREFIX),
        ("gpt2", PREFIX),
        ("mistral", PREFIX),
    ],
)
def test_a_cohort_is_a_server_for_each_client(family: str, method: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / "model")
    together = make_trunk(folder, **method)
    alone = {name: make_alone(folder, **method) for name in NAMES}
    for number in range(4):
        # Once without b, once b sends no gradient: it stays where it was and continues there.
        here = [name for name in NAMES if (name, number) != ("b", 1)]
        absent = ["b"] if number == 2 else []
        cohort = [rows_of(name, number) for name in here]
        results = step(together, cohort, absent=absent)
        for place, rows in enumerate(cohort):
            if rows.client in absent:
                close(results[place], alone[rows.client].evaluate([rows])[0])
                assert results[len(here) + place] is None
                continue
            output, gradient = step(alone[rows.client], [rows])
            close(results[place], output)
            close(results[len(here) + place], gradient)
    for name, vector in vectors(together).items():
        close(vector, in_order(together, alone[name]))
    assert not torch.allclose(vectors(together)["a"], vectors(together)["b"], atol=1e-3)

    weights = {"a": 5, "b": 1, "c": 14}
    end_round(together, weights)
    total = sum(weights.values())
    expected = torch.stack([in_order(together, alone[name]) * (w / total) for name, w in weights.items()]).sum(dim=0)
    for vector in vectors(together).values():
        close(vector, expected)
    assert together.clients is not None
    close(torch.cat([together.state()[f"trunk/{n}"].flatten() for n in together.clients.shapes]), expected)


@pytest.mark.parametrize("method", [{}, PREFIX], ids=["lora", "prefix"])
def test_clients_with_equally_many_tokens_are_a_server_each(folder: Path, method: dict[str, Any]) -> None:
    together = make_trunk(folder, **method)
    alone = {name: make_alone(folder, **method) for name in NAMES}
    for number in range(2):
        cohort = [rows_of(name, number, lengths) for name, lengths in zip(NAMES, ((6,), (2, 4), (3, 3)), strict=True)]
        step(together, cohort)
        for rows in cohort:
            step(alone[rows.client], [rows])
    for name, vector in vectors(together).items():
        close(vector, in_order(together, alone[name]))


@pytest.mark.parametrize("method", [{}, PREFIX], ids=["lora", "prefix"])
def test_a_token_budget_changes_nothing(folder: Path, method: dict[str, Any]) -> None:
    whole, chunked = make_trunk(folder, **method), make_trunk(folder, **method)
    chunked.piece_tokens = 50
    for number in range(2):
        for trunk in (whole, chunked):
            step(trunk, [rows_of(name, number) for name in NAMES])
    for name, vector in vectors(chunked).items():
        close(vector, vectors(whole)[name])


def test_who_is_absent_does_not_move_by_a_bit(folder: Path) -> None:
    trunk = make_trunk(folder)
    cohort = [rows_of(name, 0) for name in NAMES]
    step(trunk, cohort)
    before = trunk.clients.state() if trunk.clients else {}
    step(trunk, cohort, absent=["b"])
    step(trunk, [cohort[0], cohort[2]])
    after = trunk.clients.state() if trunk.clients else {}
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith(("client/b/", "trunk/")), name


def test_everyone_begins_with_the_shared_adapters_weights(folder: Path) -> None:
    trunk = make_trunk(folder)
    trunk.forward(0, [rows_of(name, 0) for name in NAMES])
    expected = in_order(trunk, make_alone(folder))
    assert all(torch.equal(vector, expected) for vector in vectors(trunk).values())


def test_who_is_new_begins_with_the_last_average(folder: Path) -> None:
    trunk = make_trunk(folder)
    step(trunk, [rows_of("a", 0), rows_of("b", 0)])
    end_round(trunk, {"a": 1, "b": 1})
    average = vectors(trunk)["a"]
    trunk.forward(0, [rows_of("c", 1)])
    assert torch.equal(vectors(trunk)["c"], average)


def test_past_the_limit_who_stepped_least_is_forgotten(folder: Path) -> None:
    trunk = make_trunk(folder, clients=2)
    step(trunk, [rows_of("a", 0), rows_of("b", 0)])
    step(trunk, [rows_of("b", 1)])
    end_round(trunk, {"a": 1, "b": 1})
    step(trunk, [rows_of("c", 2)])
    assert vectors(trunk).keys() == {"b", "c"}


def test_one_clients_overflow_is_its_own(folder: Path) -> None:
    trunk, calm = make_trunk(folder), make_trunk(folder)
    cohort = [rows_of("a", 0), rows_of("b", 0)]
    for each, huge in ((trunk, 3e38), (calm, 1.0)):
        outputs = each.forward(0, cohort)
        each.backward(0, [torch.ones_like(outputs[0]), torch.full_like(outputs[1], huge)])
        each.step()
    assert torch.equal(vectors(trunk)["a"], vectors(calm)["a"])
    assert torch.equal(vectors(trunk)["b"], trunk.clients.average if trunk.clients else torch.empty(0))


@pytest.mark.parametrize("method", [{"lora_dropout": 0.5}, PREFIX], ids=["lora", "prefix"])
def test_evaluation_goes_through_ones_own_adapter_and_keeps_nothing(folder: Path, method: dict[str, Any]) -> None:
    trunk = make_trunk(folder, **method)
    first = rows_of("c", 0)
    step(trunk, [rows_of("a", 0)])
    alike = [Rows(first.hidden, first.lengths, 1, True, name) for name in ("a", "c")]
    own, average = trunk.evaluate(alike)
    close(average, make_alone(folder, **method).evaluate([first])[0])
    assert (own - average).abs().max() > 1e-4
    assert vectors(trunk).keys() == {"a"}


@pytest.mark.parametrize("method", [PREFIX, {}], ids=["prefix", "lora"])
def test_generation_goes_through_ones_own_adapter(folder: Path, method: dict[str, Any]) -> None:
    """Rows of three clients go on together, with caches; each as if evaluated at once."""
    trunk = make_trunk(folder, **method)
    step(trunk, [rows_of("a", 0), rows_of("b", 0)])
    cohort = [rows_of(name, 1) for name in NAMES]
    caches = [[RowCache() for _ in rows.lengths] for rows in cohort]
    pieces = [[torch.split(rows.hidden, list(rows.lengths))[i] for i in range(len(rows.lengths))] for rows in cohort]
    for part in (slice(0, 1), slice(1, None)):  # the first token of each row, then the rest
        here = [[row[part] for row in of_client] for of_client in pieces]
        rows = [
            Rows(torch.cat(new), tuple(len(row) for row in new), 0, False, whole.client)
            for new, whole in zip(here, cohort, strict=True)
        ]
        last = trunk.generate(rows, caches)
    for output, rows_sent, whole in zip(last, rows, trunk.evaluate(cohort), strict=True):
        lengths = [1 + n for n in rows_sent.lengths]
        close(output, torch.cat([row[1:] for row in torch.split(whole, lengths)]))


@pytest.mark.parametrize("method", [{"lora_dropout": 0.3}, PREFIX], ids=["lora", "prefix"])
def test_a_restored_trunk_goes_on_bit_equal(folder: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """Through files, in the middle of a round, with dropout."""

    def make() -> Progress:
        job = job_of(folder, Cohort(clients=3, adapters="per_client"), **method)
        return Progress(tmp_path / "state", job, Checkpoint(str(folder)).fingerprint(), _trunk(folder, job))

    def steps(trunk: Trunk | NoTrunk, numbers: range) -> None:
        assert isinstance(trunk, Trunk)
        for number in numbers:
            step(trunk, [rows_of(name, number) for name in (NAMES if number % 2 else NAMES[:2])])

    torch.manual_seed(1)
    first = make()
    first.begin()
    steps(first.trunk, range(3))
    assert isinstance(first.trunk, Trunk)
    end_round(first.trunk, {"a": 2, "b": 1, "c": 1})
    steps(first.trunk, range(3, 5))
    first.complete_round({})
    steps(first.trunk, range(5, 8))
    second = make()
    second.begin()
    steps(second.trunk, range(5, 8))
    expected, restored = first.trunk.state(), second.trunk.state()
    assert expected.keys() == restored.keys()
    assert all(torch.equal(restored[name], value) for name, value in expected.items())


def test_other_layers_than_linear_ones_are_refused_by_name(folder: Path) -> None:
    job = job_of(folder, Cohort(adapters="per_client"))
    part = load_part(Checkpoint(str(folder)), SplitPlan(1, 1, 4), "trunk")
    part.base.layers[0].self_attn.q_proj = torch.nn.Conv1d(WIDTH, WIDTH, 1)
    make_trainable(part, job)
    with pytest.raises(JobError, match=r"layers\.0\.self_attn\.q_proj is no linear layer"):
        Trunk(part, job)


@pytest.mark.parametrize("contradiction", [{"method": {"type": "full"}}, {"training": {"parts": ["head", "tail"]}}])
def test_a_job_that_contradicts_itself_is_refused(contradiction: dict[str, Any]) -> None:
    values = {"model_name_or_path": "m", "cohort": {"adapters": "per_client"}}
    parse_job(values, "job.yaml")
    with pytest.raises(JobError, match=r"cohort\.adapters=per_client needs method\.type=lora or prefix, and trunk"):
        parse_job(values | contradiction, "job.yaml")


def test_dora_is_refused_with_the_reason() -> None:
    values = {"model_name_or_path": "m", "cohort": {"adapters": "per_client"}, "method": {"type": "lora"}}
    parse_job(values, "job.yaml")
    with pytest.raises(JobError, match=r"method\.use_dora divides by the norm.*cohort\.adapters=per_client"):
        parse_job(values | {"method": {"type": "lora", "use_dora": True}}, "job.yaml")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_tiles_hold_one_clients_tokens_each_and_lose_none(tokens: list[int]) -> None:
    tiles = tiling(tokens)
    packed = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens)).float().unsqueeze(1) + 1
    cut = tiles.cut(packed)
    assert torch.equal(tiles.join(cut), packed)
    owners = tiles.weights(torch.arange(len(tokens)).float() + 1).view(-1, 1, 1)
    assert bool(((cut == owners) | (cut == 0)).all())


def test_fedprox_pulls_each_clients_adapter_to_where_the_round_began(folder: Path) -> None:
    """Three steps of AdamW with clipping on given gradients, the proximal term's by autograd."""
    mu = 0.7
    values = job_of(folder, Cohort(clients=3, adapters="per_client")).model_dump(mode="json")
    job = parse_job(values | {"aggregation": {"type": "median", "proximal_mu": mu, "secure": "off"}}, "job")
    clients = _trunk(folder, job).clients
    assert clients is not None
    clients.admit(["a"])
    start = clients.average.clone()
    plain = torch.nn.Parameter(start.clone())
    optimizer = PartOptimizer({"w": plain}, job.training, job.total_steps)
    for seed in range(3):
        gradient = torch.randn(len(start), generator=torch.Generator().manual_seed(seed))
        clients.step({"a": gradient})
        torch.autograd.backward(gradient @ plain + mu / 2 * ((plain - start) ** 2).sum())
        optimizer.step()
    torch.testing.assert_close(clients.clients["a"].vector, plain, rtol=1e-6, atol=1e-7)
