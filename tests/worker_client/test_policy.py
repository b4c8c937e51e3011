"""What a data owner accepts: each limit refuses by name what is over it, and takes what is not."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shared.errors import JobError, Refused
from shared.identity import key_digest
from shared.invitations import BrokerAt, Invitation
from shared.job import FedAvg, Job, Rounds, Split, Training, parse_job
from worker_client.policy import Policy, check_job, check_server, load_policy

JOB = Job(
    model_name_or_path="m",
    split=Split(head_blocks=2, tail_blocks=1),
    training=Training(per_device_train_batch_size=4),
    rounds=Rounds(count=5, local_steps=10),
)
SERVER = bytes(range(32))


@pytest.mark.parametrize(
    ("policy", "refusal"),
    [
        ({"min_head_blocks": 2}, None),
        ({"min_head_blocks": 3}, "split.head_blocks=2 is less than min_head_blocks=3"),
        ({"min_tail_blocks": 2}, "split.tail_blocks=1 is less than min_tail_blocks=2"),
        ({"methods": ["lora"]}, None),
        ({"methods": ["full"]}, "method.type=lora is not among"),
        ({"max_rounds": 5}, None),
        ({"max_rounds": 4}, "rounds.count=5 is more than max_rounds=4"),
        ({"max_rows": 200}, None),
        ({"max_rows": 199}, "trains on 200 rows"),
        ({"least_noise": 0.5}, "adds no noise, and least_noise=0.5"),
        ({"max_delta": 1e-5}, "adds no noise: nothing bounds its epsilon"),
        ({"share_updates": False}, "hands out updates of head or tail"),
    ],
)
def test_a_job_that_asks_for_more_is_refused_by_name(policy: dict[str, Any], refusal: str | None) -> None:
    if refusal is None:
        check_job(Policy(**policy), JOB)
        return
    with pytest.raises(Refused, match=refusal) as refused:
        check_job(Policy(**policy), JOB)
    assert refused.value.reason == "policy"
    assert refused.value.exit_code == 1


PRIVATE = {"type": "central", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}


@pytest.mark.parametrize(
    ("policy", "refusal"),
    [
        ({"least_noise": 1.0}, None),
        ({"least_noise": 1.01}, "privacy.noise_multiplier=1 is less than least_noise=1.01"),
        ({"max_delta": 1e-5, "max_epsilon": 0.1}, None),  # a round that would overspend is refused when it comes
        ({"max_delta": 1e-6}, "privacy.delta=1e-05 is more than max_delta=1e-06"),
    ],
)
def test_a_private_job_is_held_against_noise_and_delta(policy: dict[str, Any], refusal: str | None) -> None:
    update = {"privacy": PRIVATE, "training": {"parts": ["head"]}, "rounds": {"weighting": "clients"}}
    job = parse_job(JOB.model_dump(mode="json") | update, "job")
    if refusal is None:
        check_job(Policy(**policy), job)
        return
    with pytest.raises(Refused, match=refusal) as refused:
        check_job(Policy(**policy), job)
    assert refused.value.reason == "policy"


def test_a_job_that_shares_no_updates_passes() -> None:
    trunk = JOB.model_copy(update={"training": Training(parts=("trunk",))})
    check_job(Policy(share_updates=False), trunk)
    personal = JOB.model_copy(update={"aggregation": FedAvg(personal=("head", "tail"))})
    check_job(Policy(share_updates=False), personal)
    with pytest.raises(Refused, match="hands out updates of head, and"):
        check_job(Policy(share_updates=False), JOB.model_copy(update={"aggregation": FedAvg(personal=("tail",))}))


@pytest.mark.parametrize("known", [SERVER.hex(), key_digest(SERVER).hex()])
def test_a_server_is_known_by_its_key_or_digest(known: str) -> None:
    invitation = Invitation(
        id="0" * 32,
        client="anna",
        brokers=[BrokerAt(address="tcp://localhost:1")],
        server="gpu",
        server_public_key=SERVER.hex(),
        job="0" * 64,
        expires_at=datetime.now(UTC),
    )
    check_server(Policy(), invitation)
    check_server(Policy(servers=(known,)), invitation)
    with pytest.raises(Refused, match=r"its server gpu .* is not among the policy's servers"):
        check_server(Policy(servers=("1" * 64,)), invitation)


def test_a_policy_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("min_head_blocks: 2\nmethods: [lora]\n")
    assert load_policy(path) == Policy(min_head_blocks=2, methods=("lora",))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("min_head_block: 2", "did you mean 'min_head_blocks'"),
        ("max_rounds: none", "max_rounds"),
        ("servers: [abc]", "servers.0"),
        ("least_noise: .nan", "least_noise"),
        ("max_epsilon: 8", "it needs max_delta"),
        ("max_delta: 2", "max_delta"),
        ("- 1", "mapping of settings"),
        ("{", "not YAML"),
        ("[" * 5000, "nested too deeply|not YAML"),
        ("a: &a [x]\nb: [" + "*a, " * 200 + "]", "aliases"),
        ("x: " + "y" * 2**16, "more than 65536 bytes"),
    ],
)
def test_a_wrong_policy_file_gets_one_line_that_names_it(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match=line) as error:
        load_policy(path)
    assert str(path) in error.value.message
    assert "\n" not in error.value.message
