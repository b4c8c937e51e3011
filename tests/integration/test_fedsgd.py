"""FedSGD in whole runs. That it equals one process is among the cases of tests/integration/test_training_runs.py."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import ALL, FEDSGD, Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Outcome, Site, serving, train_in_process, train_one, trunk_tensors
from shared import state_files
from shared.errors import ConnectionFailed
from shared.job import Job, Lora, parse_job

NAMES = ("a", "b", "c")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def job_of(model: Path, rounds: int = 4, **aggregation: Any) -> Job:
    values = make_job(model, Case(ALL, len(NAMES), FEDSGD, Lora(r=2))).model_dump(mode="json")
    values["rounds"] |= {"count": rounds}
    values["aggregation"] |= aggregation
    return parse_job(values, "job")


def sites() -> dict[str, Site]:
    return {name: Site(random_rows(8, seed), ()) for seed, name in enumerate(NAMES)}


def results(folder: Path, outcomes: dict[str, Outcome]) -> dict[str, Tensor]:
    trained = {f"trunk/{name}": value for name, value in trunk_tensors(folder).items()}
    for name, outcome in outcomes.items():
        trained |= {f"{name}/{key}": p.detach().clone() for key, p in outcome.parts.parameters.items()}
    return trained


@pytest.mark.parametrize("secure", ["secagg", "off"])
def test_killed_and_resumed_it_ends_bit_equal(secure: str, model: Path, tmp_path: Path) -> None:
    """The server stops when a client has done its step: its gradient is in no round, and the moments are on disk."""
    job = job_of(model, secure=secure)
    whole = results(tmp_path / "whole", train_in_process(job, sites(), tmp_path / "whole"))
    folder = tmp_path / "cut"
    with serving(job, folder, NAMES) as running:

        def stop_server(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == 2:
                running.running.stop()

        for client in [
            Background(name, partial(train_one, running, name, site, folder, stop_server))
            for name, site in sites().items()
        ]:
            with pytest.raises(ConnectionFailed):
                client.join()
    assert state_files.numbers(folder / "server-state")[-1] == 2
    again = results(folder, train_in_process(job, sites(), folder))
    assert whole.keys() == again.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, again[name])] == []


def test_masked_it_is_what_it_is_in_the_clear(model: Path, tmp_path: Path) -> None:
    masked, clear = (
        results(tmp_path / secure, train_in_process(job_of(model, secure=secure), sites(), tmp_path / secure))
        for secure in ("secagg", "off")
    )
    for name, value in clear.items():
        torch.testing.assert_close(masked[name], value, rtol=1e-4, atol=1e-6)


def test_all_clients_hold_the_same_but_for_a_personal_part_which_takes_its_own_steps(
    model: Path, tmp_path: Path
) -> None:
    job = job_of(model, rounds=2, personal=["tail"])
    outcomes = train_in_process(job, sites(), tmp_path)
    start, _ = state_files.load(tmp_path / "a", 0)
    held = {name: outcome.parts for name, outcome in outcomes.items()}
    shared = set(held["a"].shared)
    personal = set(held["a"].parameters) - shared
    assert shared
    assert personal
    for name in shared:
        values = [held[client].parameters[name] for client in NAMES]
        assert all(torch.equal(values[0], value) for value in values)
    for name in shared | personal:
        assert not torch.equal(held["a"].parameters[name], start[f"trained/{name}"])
    assert all(not torch.equal(held["a"].parameters[name], held["b"].parameters[name]) for name in personal)
