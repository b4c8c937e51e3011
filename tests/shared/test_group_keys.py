"""The group's key: its file, its fingerprint, whose job it is for, what it seals; and what such a job cannot have."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import AggregationError, JobError, KeyFileError, TensorError
from shared.group_keys import create_group_key, fingerprint, group_key_for, load_group_key
from shared.identity import create_identity
from shared.job import Job, parse_job
from shared.masked_updates import terms_of
from shared.sealed_averages import box_bytes, seal, unseal
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.terms import Member

KEY = GroupKey(bytes(range(32)))
MARK = fingerprint(KEY)
JOB = bytes(32)
VALUES = np.array([0.5, -1.25, 3e-8], np.float32)


def job_of(mark: Any = MARK, **sections: Any) -> Job:
    values: dict[str, Any] = {"model_name_or_path": "m", "training": {"parts": ["head", "tail"]}}
    values |= {"cohort": {"clients": 3}} | sections
    values["aggregation"] = {"type": "fedavg", "group_key": mark} | sections.get("aggregation", {})
    return parse_job(values, "job.yaml")


def test_a_key_file_holds_32_random_bytes_for_its_owner_alone(tmp_path: Path) -> None:
    one, other = create_group_key(tmp_path / "one.key"), create_group_key(tmp_path / "other.key")
    assert len(one.seed) == 32
    assert one != other
    assert load_group_key(tmp_path / "one.key") == one
    assert (tmp_path / "one.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyFileError, match="exists already"):
        create_group_key(tmp_path / "one.key")
    (tmp_path / "one.key").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_group_key(tmp_path / "one.key")
    assert one.seed.hex() not in repr(one)


@pytest.mark.parametrize("digits", ["00", "x" * 64])
def test_what_is_no_key_is_refused_and_not_shown(digits: str, tmp_path: Path) -> None:
    path = tmp_path / "group.key"
    path.write_text(json.dumps({"version": 1, "group_key": digits}))
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="64 hexadecimal digits") as caught:
        load_group_key(path)
    assert "xxxx" not in caught.value.message


def test_an_identity_is_no_group_key(tmp_path: Path) -> None:
    create_identity(tmp_path, "anna")
    with pytest.raises(KeyFileError):
        load_group_key(tmp_path / "anna.key")


def test_the_fingerprint_is_of_this_key_and_never_changes() -> None:
    assert re.fullmatch(r"([A-Z2-7]{5}-){5}[A-Z2-7]{5}", MARK)
    assert MARK == "AKM4Y-J43YC-6Y3OC-N33BI-MOGNE-MUJCS"
    assert fingerprint(GroupKey(bytes(32))) != MARK


def test_the_key_must_be_the_jobs(tmp_path: Path) -> None:
    path = tmp_path / "group.key"
    key = create_group_key(path)
    assert group_key_for(job_of(fingerprint(key)), path) == key
    assert group_key_for(job_of(None), None) is None
    with pytest.raises(JobError, match="--group-key is missing"):
        group_key_for(job_of(), None)
    with pytest.raises(JobError, match=r"the job has no aggregation\.group_key"):
        group_key_for(job_of(None), path)
    with pytest.raises(KeyFileError, match=f"another group's key: its fingerprint is {fingerprint(key)}, the job says"):
        group_key_for(job_of(), path)


def test_a_box_opens_for_the_group_in_this_job_and_round_alone() -> None:
    box = seal(KEY, JOB, 3, VALUES)
    assert len(box) == box_bytes(3)
    assert np.array_equal(unseal(KEY, JOB, 3, 3, box), VALUES)
    assert seal(KEY, JOB, 3, VALUES) != box
    changed = bytes([*box[:-1], box[-1] ^ 1])
    for key, job, round, frame in (
        (GroupKey(bytes(32)), JOB, 3, box),
        (KEY, bytes([1, *JOB[1:]]), 3, box),
        (KEY, JOB, 4, box),
        (KEY, JOB, 3, changed),
        (KEY, JOB, 3, bytes([box[0] ^ 1, *box[1:]])),
        (KEY, JOB, 3, box[:20]),
        (KEY, JOB, 3, box[:40]),
    ):
        with pytest.raises(AggregationError, match="do not open under this group's key") as caught:
            unseal(key, job, round, 3, frame)
        assert caught.value.hint is not None


def test_what_an_opener_may_not_seal_is_refused() -> None:
    with pytest.raises(TensorError, match="12 bytes, not 16"):
        unseal(KEY, JOB, 3, 4, seal(KEY, JOB, 3, VALUES))
    with pytest.raises(TensorError, match="NaN or infinite"):
        unseal(KEY, JOB, 3, 1, seal(KEY, JOB, 3, np.array([np.inf], np.float32)))


def test_the_terms_of_a_sum_say_so_and_can_be_encoded_for_thousands() -> None:
    members = [Member(name=f"c{number:04}", public_key=f"{number:064x}") for number in range(4096)]
    job = job_of(cohort={"clients": 4096}, rounds={"weighting": "rows"})
    terms = terms_of(job, {"w": (3,)}, members, 0, "5" * 64)
    assert terms.group_key
    assert (terms.encoding.bits, terms.encoding.shift) == (64, 12)
    assert not terms_of(job_of(None), {"w": (3,)}, members[:3], 0, "5" * 64).group_key


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aggregation": {"secure": "off"}}, "this job masks nothing"),
        ({"cohort": {"clients": 2}}, "this job masks nothing"),
        ({"training": {"parts": ["trunk"]}}, "this job masks nothing"),
        ({"aggregation": {"type": "fedadam"}}, "aggregation.type=fedadam goes on from: set fedavg"),
        (
            {
                "aggregation": {"type": "scaffold"},
                "training": {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": None},
            },
            "aggregation.type=scaffold goes on from",
        ),
        ({"aggregation": {"lora": "exact"}}, "aggregation.lora=exact looks at every"),
        (
            {
                "privacy": {"type": "central", "clip_norm": 1, "noise_multiplier": 1, "delta": 1e-5},
                "rounds": {"weighting": "clients"},
            },
            "set privacy.type=local",
        ),
        ({"wire": {"average": "int8"}}, "wire.average=int8, wire.average_density=1 send part"),
        ({"wire": {"average_density": 0.5}}, "wire.average_density=0.5 send part"),
        ({"cohort": {"clients": 6, "replicas": 2}}, "cohort.replicas=2 servers average: run one"),
        ({"aggregation": {"group_key": True}}, "which flglm keys group prints"),
        ({"aggregation": {"group_key": "ABC"}}, "group_key"),
    ],
)
def test_what_needs_the_averages_at_the_server_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as caught:
        job_of(**change)
    assert said in caught.value.message
    assert "group_key" in caught.value.message or "lora=exact" in caught.value.message
