"""LoRA aggregated right: what all go on with is the mean of the clients' own products, in head, trunk and tail."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fidelity import random_rows
from benchmarks.plain import load_plain
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Site, serving, train_in_process, train_one
from shared import state_files
from shared.errors import ConnectionFailed, JobError, TensorError
from shared.job import Job, Lora, parse_job
from shared.model.carve import load_part
from shared.model.checkpoint import Checkpoint
from shared.model.families import family_of
from shared.model.methods.lora import add_lora, reseed_lora
from shared.model.plan import SplitPlan
from shared.model.residuals import FACTOR_A, FACTOR_B, modules_of
from shared.model.trainable import make_trainable
from worker_client.batches import batch_indices
from worker_client.client import _write_result
from worker_client.head_tail import HeadTail, load_client_parts
from worker_server.aggregators.method import Update
from worker_server.kept import Rows
from worker_server.progress import Progress
from worker_server.round_end import Aggregated, aggregate
from worker_server.trunk import Trunk

NAMES = ("a", "b", "c")
SCALING = 16 / 2
WIDTH = 32


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny_model(request.param, tmp_path / "model")


def job_of(model: Path, lora: str, rounds: int = 2, **aggregation: Any) -> Job:
    values = {
        "model_name_or_path": str(model),
        "method": {"type": "lora", "r": 2},
        "training": {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "weight_decay": 0.1, "seed": 5},
        "rounds": {"count": rounds, "local_steps": 3},
        "cohort": {"clients": 3, "adapters": "per_client"},
        "aggregation": {"type": "fedavg", "lora": lora, "secure": "off" if lora == "exact" else None, **aggregation},
    }
    return parse_job(values, "job")


def sites() -> dict[str, Site]:
    return {name: Site(random_rows(8, seed), random_rows(2, 9)) for seed, name in enumerate(NAMES)}


def of(folder: Path, number: int, prefix: str) -> dict[str, Tensor]:
    tensors, _ = state_files.load(folder, number)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def weights() -> dict[str, list[int]]:
    """What each client weighs in either round: the target tokens of the rows of its 3 steps, 4 of its 8 rows each."""
    found = {}
    for seed, name in enumerate(NAMES):
        rows = random_rows(8, seed)
        found[name] = [
            sum(rows[i].target_tokens for step in range(3) for i in batch_indices(8, 4, 3 * number + step, 5))
            for number in range(2)
        ]
    return found


def shares_of(number: int) -> dict[str, float]:
    total = sum(of_client[number] for of_client in weights().values())
    return {name: of_client[number] / total for name, of_client in weights().items()}


def frozen(parts: HeadTail, module: str) -> Tensor:
    """The module's own weight as it is now, (out, in)."""
    layer, _ = parts.residuals.layers[module]
    return layer.weight.detach() if isinstance(layer, torch.nn.Linear) else layer.weight.detach().T


def test_exact_is_the_mean_of_products_in_head_and_tail(model: Path, tmp_path: Path) -> None:
    """After either of two rounds; the second begins with what the first left."""
    job = job_of(model, "exact")
    outcomes = train_in_process(job, sites(), tmp_path)
    parts = outcomes["a"].parts
    first = load_client_parts(Checkpoint(str(model)), job)
    modules = modules_of(parts.parameters)
    assert modules
    assert parts.residuals.layers.keys() == set(modules)
    so_far = {module: frozen(first, module).double() for module in modules}
    for number in (0, 1):
        shares = shares_of(number)
        trained = {name: of(tmp_path / name, number + 1, "trained/") for name in NAMES}
        server = of(tmp_path / "server-state", number + 1, "average/")
        residuals = of(tmp_path / "server-state", number + 1, "aggregator/residual/")
        for module in modules:
            products = [
                share * trained[n][module + FACTOR_B].double() @ trained[n][module + FACTOR_A].double()
                for n, share in shares.items()
            ]
            expected = so_far[module] + SCALING * sum(products)
            after = frozen(first, module) + SCALING * residuals[module]
            merged = after + SCALING * server[module + FACTOR_B] @ server[module + FACTOR_A]
            torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)
            assert float(residuals[module].abs().max()) > 1e-4
            so_far[module] = after.double()
    for outcome in outcomes.values():
        for module in modules:
            torch.testing.assert_close(frozen(outcome.parts, module).double(), so_far[module], rtol=1e-6, atol=1e-7)
    _write_result(tmp_path, job, parts, None)
    written = load_file(tmp_path / "trained.safetensors")
    for module in modules:
        total = frozen(first, module) + written[f"residual/{module}.weight"]
        torch.testing.assert_close(total, frozen(parts, module), rtol=0, atol=0)


def test_what_is_exact_survives_a_kill_to_the_bit(tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path / "model"), "exact", rounds=3)
    whole = train_in_process(job, sites(), tmp_path / "whole")
    folder = tmp_path / "cut"
    with serving(job, folder, NAMES) as running:

        def stop_server(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == 7:
                running.running.stop()

        for client in [
            Background(name, partial(train_one, running, name, site, folder, stop_server))
            for name, site in sites().items()
        ]:
            with pytest.raises(ConnectionFailed):
                client.join()
    again = train_in_process(job, sites(), folder)
    for name, outcome in whole.items():
        for key, value in outcome.parts.parameters.items():
            assert torch.equal(value, again[name].parts.parameters[key])
        for module in outcome.parts.residuals.layers:
            assert torch.equal(frozen(outcome.parts, module), frozen(again[name].parts, module))
    servers = [state_files.load(path / "server-state", 3)[0] for path in (tmp_path / "whole", folder)]
    assert servers[0].keys() == servers[1].keys()
    assert [n for n, value in servers[0].items() if n != "random/torch" and not torch.equal(value, servers[1][n])] == []


def make_trunk(model: Path, lora: str) -> Trunk:
    job = job_of(model, lora)
    part = load_part(Checkpoint(str(model)), SplitPlan(1, 1, 4), "trunk")
    make_trainable(part, job)
    return Trunk(part, job)


def train(trunk: Trunk, steps: int, seed: int = 0) -> list[Update]:
    """Steps of all clients on rows of their own; their updates."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = [Rows(torch.randn(5, WIDTH, generator=generator), (5,), 5, True, name) for name in NAMES]
        outputs = trunk.forward(0, rows)
        trunk.backward(0, [output - torch.randn(5, WIDTH, generator=generator) for output in outputs])
        trunk.step()
    return [Update(name, weight, trunk.own_values(name)) for name, weight in zip(NAMES, (5, 1, 14), strict=True)]


def end_round(trunk: Trunk, updates: list[Update], state: Any) -> Aggregated:
    result = aggregate(trunk.job, trunk.own_start(), updates, state)
    trunk.end_round(dict(result.values))
    trunk.take_residuals(result.state)
    return result


def merged(trunk: Trunk) -> dict[str, Tensor]:
    """Each trunk layer's weight with what all clients go on with, (out, in)."""
    values = trunk.own_start()
    found = {}
    for module, (layer, scaling) in trunk.residuals.layers.items():
        weight = layer.weight.detach() if isinstance(layer, torch.nn.Linear) else layer.weight.detach().T
        found[module] = (weight + scaling * values[module + FACTOR_B] @ values[module + FACTOR_A]).double()
    return found


def test_exact_is_the_mean_of_products_in_the_clients_trunks(model: Path) -> None:
    trunk = make_trunk(model, "exact")
    state: Any = {}
    for number in range(3):
        before = {m: layer.weight.detach().clone() for m, (layer, _) in trunk.residuals.layers.items()}
        updates = train(trunk, 3, number)
        expected = {}
        for module, (layer, scaling) in trunk.residuals.layers.items():
            weight = before[module] if isinstance(layer, torch.nn.Linear) else before[module].T
            products = [u.weight / 20 * u.values[module + FACTOR_B] @ u.values[module + FACTOR_A] for u in updates]
            expected[module] = weight.double() + scaling * sum(products).double()  # type: ignore[union-attr]
        state = end_round(trunk, updates, state).state
        for module, value in merged(trunk).items():
            torch.testing.assert_close(value, expected[module], rtol=1e-5, atol=1e-6)
    assert len(merged(trunk)) >= 2


def test_a_round_that_is_undone_takes_its_residuals_with_it(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    trunk = make_trunk(model, "exact")
    progress = Progress(tmp_path / "state", trunk.job, Checkpoint(str(model)).fingerprint(), trunk)
    progress.begin()
    kept = []
    for number in range(2):
        kept.append({module: layer.weight.detach().clone() for module, (layer, _) in trunk.residuals.layers.items()})
        result = end_round(trunk, train(trunk, 2, number), progress.aggregator)
        progress.complete_round({}, result.state)
    progress.restore(1)
    for module, (layer, _) in trunk.residuals.layers.items():
        assert torch.equal(layer.weight, kept[1][module])
        assert not torch.equal(layer.weight, kept[0][module])
    trunk.take_residuals({})
    assert all(torch.equal(layer.weight, kept[0][module]) for module, (layer, _) in trunk.residuals.layers.items())


def test_with_a_frozen_the_mean_of_products_is_the_product_of_means(model: Path, tmp_path: Path) -> None:
    """A stays what peft's layers hold after seeding, in head, trunk and tail, whatever the weight decay."""
    job = job_of(model, "freeze_a")
    outcomes = train_in_process(job, sites(), tmp_path)
    parts = outcomes["a"].parts
    assert parts.parameters
    assert all(name.endswith(FACTOR_B) for name in parts.parameters)
    whole = load_plain_lora(model)
    for part in (parts.head, parts.tail):
        for name, value in part.named_parameters().items():
            if name.endswith(FACTOR_A):
                assert torch.equal(value, whole[name])
    trunk = of(tmp_path / "server-state", 2, "trunk/")
    frozen_a = [name for name in trunk if name.endswith(FACTOR_A)]
    assert frozen_a
    assert all(torch.equal(trunk[name], whole[name]) for name in frozen_a)
    assert all(float(trunk[name].abs().max()) > 1e-4 for name in trunk if name.endswith(FACTOR_B))
    trained = {name: of(tmp_path / name, 2, "trained/") for name in NAMES}
    for name, value in parts.parameters.items():
        a = whole[name.removesuffix(FACTOR_B) + FACTOR_A]
        products = sum(share * trained[client][name] @ a for client, share in shares_of(1).items())
        torch.testing.assert_close(value.detach() @ a, products, rtol=1e-5, atol=1e-7)


def load_plain_lora(model: Path) -> dict[str, Tensor]:
    """Every adapter weight of the whole model as the job seeds it, by name."""
    whole = load_plain(str(model))
    add_lora(whole, Lora(r=2), family_of(whole.config).lora_targets)
    reseed_lora(whole.named_parameters(), 5)
    return {name: value.detach() for name, value in whole.named_parameters()}


def test_residuals_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    parts = load_client_parts(Checkpoint(str(model)), job_of(model, "exact"))
    module = next(iter(parts.residuals.layers))
    before = frozen(parts, module).clone()
    for bad in ({module: torch.ones(2, 2)}, {module: torch.ones_like(before), "model.layers.9.x": torch.ones(1)}):
        with pytest.raises(TensorError, match="does not fit this model"):
            parts.residuals.apply(bad)
    assert torch.equal(frozen(parts, module), before)
    other = load_client_parts(Checkpoint(str(model)), job_of(model, "average"))
    with pytest.raises(TensorError, match="does not fit this model"):
        other.residuals.apply({module: torch.ones_like(before)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {"type": "full"}, "cohort": {"clients": 3}}, "aggregation.lora=exact needs method.type=lora"),
        ({"aggregation": {"type": "fedadam", "lora": "exact"}}, "needs aggregation.type=fedavg"),
        ({"training": {"trunk_dtype": "bfloat16"}}, "needs training.trunk_dtype=float32"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    values = job_of(Path("m"), "exact").model_dump(mode="json")
    with pytest.raises(JobError, match=said):
        parse_job(values | change, "job")
