"""benchmarks.paper: the rule of its verdicts, training in turn, and that a quick run measures every way."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import paper
from benchmarks.fidelity import of_step, random_rows
from benchmarks.in_turn import InTurn, Turns
from benchmarks.joint_run import train
from benchmarks.paper_runs import WAYS, Settings, make_job, task_files
from benchmarks.plain import load_plain, train_plain
from benchmarks.tiny_corpora import save_model, save_task
from benchmarks.tiny_models import save_tiny_model
from benchmarks.verdicts import Verdict, blind_score, overall, pooled_spread, score_of, verdict
from shared.errors import DeadlineExceeded
from shared.job import Cohort, Full, Job, Rounds, Training
from worker_client.evaluation.cases import Example
from worker_client.evaluation.metrics import accuracy, accuracy_and_macro_f1

# Verdicts


def test_spread_is_pooled_over_both_samples() -> None:
    assert pooled_spread([0.5, 0.7], [0.6, 0.6]) == pytest.approx((0.02 / 2) ** 0.5)
    assert pooled_spread([1.0, 2.0, 3.0], [5.0, 6.0, 7.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ([0.70, 0.72, 0.74], "confirmed"),  # the same
        ([0.69, 0.71, 0.73], "confirmed"),  # 0.01 below, spread 0.02
        ([0.65, 0.67, 0.69], "refuted"),  # 0.05 below
        ([0.75, 0.77, 0.79], "refuted"),  # better is not equal
    ],
)
def test_equal_within_the_spread(split: list[float], says: str) -> None:
    assert verdict(split, [0.70, 0.72, 0.74], blind=0.5).says == says


def test_where_nobody_learnt_nothing_is_said() -> None:
    """Centralised 0.51 +- 0.02, blind 0.5."""
    centralised = [0.49, 0.51, 0.53]
    assert verdict(centralised, centralised, blind=0.5).says == "says nothing"
    assert verdict([0.5, 0.5], [0.5, 0.5], blind=0.5).says == "says nothing"
    # Farther apart than the spread, and no better than blind.
    assert verdict([0.44, 0.45, 0.46], centralised, blind=0.5).says == "says nothing"


def test_where_one_of_both_learnt_they_are_not_equal() -> None:
    nothing, much = [0.49, 0.51, 0.53], [0.70, 0.72, 0.74]
    assert verdict(much, nothing, blind=0.5).says == "refuted"
    assert verdict(nothing, much, blind=0.5).says == "refuted"


def test_one_seed_has_no_spread() -> None:
    assert verdict([0.9], [0.9], blind=0.5) == Verdict(0.0, 0.0, "says nothing")


def test_a_claim_is_refuted_by_one_task() -> None:
    confirmed, refuted, nothing = (Verdict(0.0, 0.0, says) for says in ("confirmed", "refuted", "says nothing"))
    assert overall([confirmed, refuted, nothing]) == "refuted"
    assert overall([confirmed, nothing]) == "confirmed"
    assert overall([nothing]) == "says nothing"


def test_blind_answering_is_the_best_constant() -> None:
    questions = [Example("", {"a": "", "b": ""}, (right,)) for right in ("a", "a", "a", "b")]
    assert blind_score(questions, accuracy) == 0.75
    # Of CB's two metrics: accuracy 3/4, and F1 of 6/7 and 0.
    assert blind_score(questions, accuracy_and_macro_f1) == pytest.approx((3 / 4 + 3 / 7) / 2)
    assert score_of({"accuracy": 0.5, "macro_f1": 0.3}) == pytest.approx(0.4)


def test_where_options_differ_blind_answering_is_chance() -> None:
    questions = [Example("", {"a": "", "b": ""}, ("a",)), Example("", {"c": "", "d": "", "e": "", "f": ""}, ("c",))]
    assert blind_score(questions, accuracy) == pytest.approx((1 / 2 + 1 / 4) / 2)


# Training in turn


def test_turns_go_round() -> None:
    turns, order = Turns(clients=2, steps=3), []
    for _ in range(12):
        order.append(turns.whose())
        turns.stepped()
    assert order == [0, 0, 0, 1, 1, 1] * 2
    with pytest.raises(DeadlineExceeded):
        turns.wait(1, 0.0)


def test_training_in_turn_is_one_process_that_takes_the_clients_batches_in_that_order(tmp_path: Path) -> None:
    """The trunk alone is trained, so that nothing is averaged: exact."""
    model = save_tiny_model("llama", tmp_path / "model")
    local_steps, count = 2, 2
    job = Job(
        model_name_or_path=str(model),
        method=Full(),
        training=Training(
            parts=("trunk",), per_device_train_batch_size=3, learning_rate=1e-2, lr_scheduler_type="constant"
        ),
        rounds=Rounds(count=count, local_steps=local_steps),
        cohort=Cohort(clients=3, mode="greedy"),
    )
    rows = {f"client-{seed}": random_rows(10, seed) for seed in range(3)}
    run = train(job, rows, tmp_path / "run", trunks=InTurn(clients=tuple(rows), local_steps=local_steps), threads=1)
    order = [
        of_step(job, mine, round * local_steps + step)
        for round in range(count)
        for mine in rows.values()
        for step in range(local_steps)
    ]
    plain = load_plain(str(model))
    plain.requires_grad_(False)
    parameters = dict(plain.named_parameters())
    for name in run.trained:
        parameters[name].requires_grad_(True)
    begun = {name: parameters[name].detach().clone() for name in run.trained}
    expected = train_plain(plain, order, job.training, len(order), [[parameters[name] for name in run.trained]])
    seen = {client: iter([e["loss"] for e in events if e["event"] == "step"]) for client, events in run.events.items()}
    losses = [next(seen[client]) for _ in range(count) for client in rows for _ in range(local_steps)]
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in run.trained.items():
        # AdamW divides a gradient that is nearly 0 by its own size, rounding included.
        torch.testing.assert_close(value, parameters[name].detach(), rtol=0, atol=2e-4)
    assert any((parameters[name].detach() - begun[name]).abs().max() > 2e-2 for name in begun)
    assert all(count > 0 for count in (*run.bytes_up.values(), *run.bytes_down.values()))


# The command


def test_every_way_is_a_job(tmp_path: Path) -> None:
    """One that contradicts itself would be refused; each differs from the others."""
    settings = Settings(str(tmp_path), "prefix", 128, 1e-3, 3, 4, 10, 5, 256, 100, 100)
    jobs = {name: make_job(settings, way, 7) for name, way in WAYS.items()}
    assert jobs["server_hierarchical"].cohort.adapters == "per_client"
    assert jobs["plain_fedavg"].split.trunk == "client"
    assert jobs["sequential"].cohort.mode == "greedy"
    assert jobs["centralised"] == jobs["client_batch"]
    assert all(job.prefix_tokens == 128 and job.training.seed == 7 for job in jobs.values())


def test_tasks_are_found_as_superglue_names_them(tmp_path: Path) -> None:
    save_task(tmp_path, "RTE")
    (tmp_path / "CB").mkdir()
    (tmp_path / "CB" / "train.jsonl").write_text("")
    assert task_files(tmp_path, "rte") == (tmp_path / "RTE" / "train.jsonl", tmp_path / "RTE" / "val.jsonl")
    assert task_files(tmp_path, "cb") is None
    assert task_files(tmp_path / "nowhere", "rte") is None


def test_a_task_without_data_is_skipped_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    paper.main(["--model", str(model), "--data", str(tmp_path / "none"), "--tasks", "wic"])
    assert "skipped: wic: no folder wic with train.* and val.*" in capsys.readouterr().err


def test_an_unknown_task_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        paper.main(["--model", str(model), "--tasks", "rows"])
    assert ended.value.code != 0
    assert "'rows' is no task with options" in capsys.readouterr().err


def test_a_quick_run_tries_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--quick", "--json", "--ways", "centralised", "sequential", "server_hierarchical", "--out", str(out)]
    paper.main(words)
    said = capsys.readouterr()
    figures = json.loads(said.out)["figures"]
    cell = figures["cells"]["rte, sequential"]
    assert [len(each["runs"]) for each in figures["cells"].values()] == [2, 2, 2]
    assert cell["bytes_up"] > 0
    assert figures["cells"]["rte, centralised"]["bytes_up"] == 0
    assert figures["split_equals_centralised"].keys() == {"sequential", "server_hierarchical"}
    assert "split (sequential) equals centralised within the spread:" in said.err
    assert json.loads((out / "paper.json").read_text()) == figures
    kept = sorted(path.name for path in out.glob("rte*.json"))
    assert len(kept) == 6
    (out / kept[0]).unlink()
    paper.main(words)
    assert sorted(path.name for path in out.glob("rte*.json")) == kept
