"""What a client checks before it sends anything: the job is the invited one, the model the server's, a tokenizer."""

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from shared.errors import HandshakeError, ModelError, Refused, SchemaError
from shared.invitations import BrokerAt, Invitation
from shared.job import Job
from shared.model.checkpoint import Checkpoint
from shared.model.families import context_length
from shared.payload.messages import RoundStart, Welcome
from worker_client.client import agreed_job, check_same_model, load_tokenizer
from worker_client.link import Answer, Link
from worker_client.remote_trunk import RemoteTrunk

JOB = Job(model_name_or_path="m")


def invitation(job: Job) -> Invitation:
    return Invitation(
        id="0" * 32,
        client="anna",
        brokers=[BrokerAt(address="tcp://localhost:1")],
        server="server",
        server_public_key="0" * 64,
        job=job.digest().hex(),
        expires_at=datetime.now(UTC),
    )


def welcome(text: str) -> Welcome:
    return Welcome(job=text, config="0" * 64, tensor_table="0" * 64, weights="0" * 64)


def test_the_invited_job_is_accepted() -> None:
    assert agreed_job(welcome(JOB.canonical().decode()), invitation(JOB)) == JOB


@pytest.mark.parametrize(
    "text",
    [
        Job(model_name_or_path="m", name="other").canonical().decode(),
        json.dumps(JOB.model_dump(mode="json"), indent=1),
        "{}",
        "no JSON",
        "",
    ],
)
def test_anything_else_is_refused_before_it_is_read(text: str) -> None:
    with pytest.raises(HandshakeError, match="another job"):
        agreed_job(welcome(text), invitation(JOB))


def test_a_client_with_another_model_is_told_what_differs(tmp_path: Path) -> None:
    mine = Checkpoint(str(save_tiny_model("llama", tmp_path / "mine"))).fingerprint()
    theirs = Welcome(job="{}", config=mine.config, tensor_table=mine.tensors, weights=mine.weights)
    check_same_model(Checkpoint(str(tmp_path / "mine")), theirs)
    weights = Checkpoint(str(save_tiny_model("llama", tmp_path / "weights", seed=1)))
    config = Checkpoint(str(save_tiny_model("llama", tmp_path / "config", rms_norm_eps=1e-3)))
    for other, said in ((weights, "the weights differ"), (config, "the configurations differ")):
        with pytest.raises(Refused, match=said) as refused:
            check_same_model(other, theirs)
        assert refused.value.reason == "model_differs"
        assert refused.value.hint is not None


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    with pytest.raises(ModelError, match="no tokenizer") as error:
        load_tokenizer(Checkpoint(str(folder)))
    assert "\n" not in error.value.message
    save_word_tokenizer(folder)
    assert load_tokenizer(Checkpoint(str(folder))).eos_token_id == 1


def test_the_context_is_the_models() -> None:
    assert context_length(SimpleNamespace(max_position_embeddings=64)) == 64
    assert context_length(SimpleNamespace()) == 2**20


@pytest.mark.parametrize(("round", "taken"), [(0, True), (1, True), (2, False), (2**40, False)])
def test_no_round_is_trained_beyond_those_of_the_job(round: int, taken: bool) -> None:
    """Whatever the server says: policy and privacy were held against these many."""

    class Answering:
        def next_request(self) -> int:
            return 1

        def send(self, *_: Any) -> None: ...

        def wait(self, *_: Any) -> Answer:
            return Answer(RoundStart(request=1, round=round, members=1), [])

    job = Job.model_validate({"model_name_or_path": "m", "rounds": {"count": 2}})
    trunk = RemoteTrunk(cast(Link, Answering()), job, 1.0)
    if taken:
        assert trunk.join(5).round == round
    else:
        with pytest.raises(SchemaError, match=rf"begins round {round + 1} of 2 \(rounds.count\)"):
            trunk.join(5)
