"""The joint model through a session: head and tail of a client's folder, the trunk at the running server."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.fidelity import ALL, HEAD, Case, make_job, random_rows
from benchmarks.plain import load_plain, row_logits
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher.in_process import CLIENTS, Background, Serving, Site, serving, train_one, trunk_tensors
from launcher.whole_models import with_method
from shared import state_files
from shared.errors import CheckpointError, ConnectionFailed, FlglmError, Refused
from shared.identity import Identity, generate_identity
from shared.invitations import BrokerAt, Invitation
from shared.job import Full, Job, Lora, Prefix, Prompt
from shared.job.aggregation import FedAvg
from shared.model.families import FAMILIES
from worker_client.batches import pack_rows, with_virtual_tokens
from worker_client.client import _write_result
from worker_client.data import Row
from worker_client.evaluation.joint_model import SessionSettings, joint_model
from worker_client.evaluation.local_model import Trained, load_local_model
from worker_client.evaluation.model import Model
from worker_client.evaluation.scoring import likelihoods
from worker_client.policy import Policy

TEST_ROWS = random_rows(5, 40)
PROMPT = [30, 31, 44, 9]
CASES = {
    "lora": Case(ALL, 2, method=Lora(r=4, lora_alpha=64)),
    "full": Case(ALL, 2, method=Full()),
    "prefix": Case(ALL, 2, method=Prefix(num_virtual_tokens=5)),
    "prompt": Case(HEAD, 2, method=Prompt(num_virtual_tokens=5)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes 64 tokens; token 1 is the end."""
    made = save_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    save_word_tokenizer(made)
    return made


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job_of(model: Path, case: Case, **changes: Any) -> Job:
    job = make_job(model, case)
    rounds = job.rounds.model_copy(update={"count": 2, "local_steps": 2})
    training = job.training.model_copy(update={"learning_rate": 1e-2})
    return job.model_copy(update={"rounds": rounds, "training": training, **changes})


def invitation_to(running: Serving, **changes: Any) -> Invitation:
    invitation = Invitation(
        id="0" * 32,
        client="a",
        brokers=[BrokerAt(address="tcp://localhost:1")],
        server="server",
        server_public_key=running.server.public.hex(),
        job=running.job.digest().hex(),
        expires_at=datetime.now(UTC),
    )
    return invitation.model_copy(update={"brokers": [BrokerAt.model_construct(address=CLIENTS)], **changes})


def trained_by_both(running: Serving, folder: Path) -> dict[str, torch.Tensor]:
    """Both clients to the end of the job, a's result in its folder; all that was trained, by its name."""
    outcomes = {}

    def one(name: str, seed: int) -> None:
        outcomes[name] = train_one(running, name, Site(random_rows(8, seed)), folder)

    threads = [Background(name, lambda n=name, s=seed: one(n, s)) for seed, name in enumerate(("a", "b"))]
    for thread in threads:
        thread.join()
    _write_result(folder / "a", running.job, outcomes["a"].parts, None)
    return trunk_tensors(folder) | {n: p.detach() for n, p in outcomes["a"].parts.parameters.items()}


def log_probability(model: Model, rows: Sequence[Row]) -> list[float]:
    return [each.log_probability for each in likelihoods(model.logits, rows)]


@pytest.mark.parametrize("method", CASES)
def test_scores_and_texts_are_those_of_the_whole_model(method: str, model: Path, tmp_path: Path) -> None:
    """By peft in one process, and of all parts at hand; nothing but sessions was opened, and the server serves on."""
    job = job_of(model, CASES[method])
    with serving(job, tmp_path, ["a", "b"], keep_serving=True) as running:
        trained = trained_by_both(running, tmp_path)
        settings = SessionSettings(tmp_path / "a")
        with joint_model(settings, invitation_to(running), running.clients["a"], running.context) as joint:
            scored = log_probability(joint, TEST_ROWS)
            continued = joint.continued(PROMPT, 8)
            assert joint.source == tmp_path / "a"
        assert running.running.finished
        assert running.service.thread.is_alive()

    whole, by_name = with_method(load_plain(str(model)), job, FAMILIES["llama"])
    with torch.no_grad():
        before = [row_logits(whole.eval(), row) for row in TEST_ROWS]
        for name, value in trained.items():
            by_name[name].copy_(value)
        after = [row_logits(whole.eval(), row) for row in TEST_ROWS]
        assert scored == pytest.approx([_sum(*pair) for pair in zip(after, TEST_ROWS, strict=True)], rel=1e-5)
        assert scored != pytest.approx([_sum(*pair) for pair in zip(before, TEST_ROWS, strict=True)], rel=1e-3)
        ids = list(PROMPT)
        for _ in range(8):
            ids.append(int(whole(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert continued == ids[len(PROMPT) :][: len(continued)]
    assert len(continued) == 8 or ids[len(PROMPT) + len(continued)] == 1

    at_hand = load_local_model(str(model), trained_by=Trained(tmp_path / "a", tmp_path / "server-state"))
    assert log_probability(at_hand, TEST_ROWS) == pytest.approx(scored, rel=1e-5)
    assert at_hand.continued(PROMPT, 8) == continued


def _sum(logits: torch.Tensor, row: Row) -> float:
    """Of the tokens that count: logits (T, vocabulary) of a row's own tokens."""
    at = [place for place in range(1, len(row.input_ids)) if row.counts[place]]
    targets = torch.tensor([row.input_ids[place] for place in at])
    return -float(F.cross_entropy(logits[[place - 1 for place in at]], targets, reduction="sum"))


@pytest.mark.parametrize("adapters", ["shared", "per_client"])
def test_what_was_added_to_frozen_weights_is_there_too(adapters: Any, model: Path, tmp_path: Path) -> None:
    """FedEx-LoRA's residuals: of head and tail in the client's result, of per-client adapters at the server."""
    job = job_of(model, CASES["lora"], aggregation=FedAvg(lora="exact"))
    parts = ALL if adapters == "per_client" else ("head", "tail")
    training = job.training.model_copy(update={"parts": parts})
    job = job.model_copy(update={"training": training, "cohort": job.cohort.model_copy(update={"adapters": adapters})})
    with serving(job, tmp_path, ["a", "b"], keep_serving=True) as running:
        trained_by_both(running, tmp_path)
        with joint_model(
            SessionSettings(tmp_path / "a"), invitation_to(running), running.clients["a"], running.context
        ) as joint:
            scored = log_probability(joint, TEST_ROWS)
            added = joint.parts.residuals.added
            assert added
            joint.parts.residuals.put({})
            assert log_probability(joint, TEST_ROWS) != pytest.approx(scored, rel=1e-6)
    with (
        serving(job, tmp_path, ["a"], keep_serving=True) as again,  # the finished job, from its checkpoint
        joint_model(SessionSettings(tmp_path / "a"), invitation_to(again), again.clients["a"], again.context) as joint,
    ):
        assert log_probability(joint, TEST_ROWS) == pytest.approx(scored, rel=1e-6)
    at_hand = load_local_model(str(model), trained_by=Trained(tmp_path / "a", tmp_path / "server-state"))
    assert log_probability(at_hand, TEST_ROWS) == pytest.approx(scored, rel=1e-5)


def test_plain_fedavg_is_evaluated_at_the_client_itself(model: Path, tmp_path: Path) -> None:
    job = job_of(model, Case(ALL, 2, {"split": {"trunk": "client"}}, Lora(r=4, lora_alpha=64)))
    with serving(job, tmp_path, ["a", "b"], keep_serving=True) as running:
        trained_by_both(running, tmp_path)
        with joint_model(
            SessionSettings(tmp_path / "a"), invitation_to(running), running.clients["a"], running.context
        ) as joint:
            scored = log_probability(joint, TEST_ROWS)
    at_hand = load_local_model(str(model), trained_by=Trained(tmp_path / "a", None))
    assert log_probability(at_hand, TEST_ROWS) == pytest.approx(scored, rel=1e-5)


def test_while_others_train_and_nothing_of_it_changes(model: Path, tmp_path: Path) -> None:
    """A client evaluates its newest checkpoint in a second session, between its own steps: the run ends bit-equal."""
    job = job_of(model, CASES["lora"])

    def run(folder: Path, look: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
        seen: list[float] = []
        with serving(job, folder, ["a", "b"]) as running:
            other = Background("b", lambda: train_one(running, "b", Site(random_rows(8, 1)), folder))

            def report(event: dict[str, Any]) -> None:
                if look and event["event"] == "step":
                    settings = SessionSettings(folder / "a")
                    with joint_model(settings, invitation_to(running), running.clients["a"], running.context) as joint:
                        assert joint.source == folder / "a" / f"checkpoint-{event['round']}"
                        seen.extend(log_probability(joint, TEST_ROWS[:1]))

            outcome = train_one(running, "a", Site(random_rows(8, 0)), folder, report)
            other.join()
            running.service.join()
        return trunk_tensors(folder) | {n: p.detach() for n, p in outcome.parts.parameters.items()}, seen

    alone, _ = run(tmp_path / "alone", look=False)
    watched, seen = run(tmp_path / "watched", look=True)
    assert len(set(seen)) == 4
    assert [name for name in alone if not torch.equal(alone[name], watched[name])] == []


def test_long_batches_go_in_pieces_that_the_job_allows(model: Path, tmp_path: Path) -> None:
    job = job_of(model, CASES["prompt"])
    data = job.data.model_copy(update={"max_length": 26})
    small = job.model_copy(update={"data": data, "cohort": job.cohort.model_copy(update={"max_batch_tokens": 104})})
    scored = {}
    for name, each in (("whole", job), ("pieces", small)):
        folder = tmp_path / name
        state_files.save(folder / "a", 0, {"trained/model.embed_tokens.prompt": torch.ones(5, 32)}, _facts(each))
        with serving(each, folder, ["a"]) as running:
            settings = SessionSettings(folder / "a")
            with joint_model(settings, invitation_to(running), running.clients["a"], running.context) as joint:
                scored[name] = log_probability(joint, random_rows(30, 3))
                if name == "pieces":
                    assert joint.context == 21
    assert scored["pieces"] == pytest.approx(scored["whole"], rel=1e-5)


def _facts(job: Job) -> dict[str, Any]:
    return {"job": job.digest().hex(), "steps": 0.0}


def test_virtual_tokens_come_before_each_row_of_any_batch() -> None:
    rows = random_rows(6, 2)
    made, expected = with_virtual_tokens(pack_rows(rows), 3), pack_rows(rows, 3)
    assert made.lengths == expected.lengths
    for name in ("input_ids", "at", "targets", "row"):
        assert torch.equal(getattr(made, name), getattr(expected, name))


def test_what_does_not_go_together_is_said_in_one_line(model: Path, tmp_path: Path) -> None:
    job = job_of(model, CASES["prompt"])
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    with serving(job, tmp_path, ["a"]) as running:
        invitation, mine = invitation_to(running), running.clients["a"]
        state_files.save(tmp_path / "a", 0, {"trained/model.embed_tokens.prompt": torch.ones(5, 32)}, _facts(job))
        state_files.save(tmp_path / "wide", 0, {"trained/model.embed_tokens.prompt": torch.ones(5, 64)}, _facts(job))
        state_files.save(tmp_path / "old", 0, {}, {"job": "0" * 64, "steps": 0.0})
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "flglm.json").write_text("[]")

        def refused(
            kind: type[FlglmError],
            settings: SessionSettings,
            by: Invitation = invitation,
            identity: Identity = mine,
        ) -> FlglmError:
            with pytest.raises(kind) as error, joint_model(settings, by, identity, running.context):
                pass
            assert "\n" not in error.value.message
            return error.value

        there = SessionSettings(tmp_path / "a", connect_timeout_s=1.0)
        assert "no result and no checkpoint" in refused(CheckpointError, SessionSettings(tmp_path / "none")).message
        assert "another job" in refused(CheckpointError, SessionSettings(tmp_path / "old")).message
        assert "not a job's result" in refused(CheckpointError, SessionSettings(tmp_path / "broken")).message
        assert "not those" in refused(CheckpointError, SessionSettings(tmp_path / "wide")).message
        assert "the weights differ" in refused(Refused, replace(there, model=str(other))).message
        assert "min_head_blocks" in refused(Refused, replace(there, policy=Policy(min_head_blocks=9))).message
        refused(Refused, there, identity=generate_identity("stranger"))
        away = invitation_to(running, server_public_key=generate_identity("elsewhere").public.hex())
        assert "the server is not at the broker" in refused(ConnectionFailed, there, away).message
        changed = job.model_copy(update={"name": "changed"}).digest().hex()
        state_files.save(tmp_path / "new", 0, {}, {"job": changed, "steps": 0.0})
        error = refused(Refused, SessionSettings(tmp_path / "new"), invitation_to(running, job=changed))
        assert isinstance(error, Refused)
        assert error.reason == "job_differs"
