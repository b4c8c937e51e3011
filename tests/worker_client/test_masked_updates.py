"""What a client checks before it masks, and what it refuses: members, rosters, policies, updates in the clear."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from shared.allow_list import AllowList
from shared.errors import JobError, KeyFileError, Refused, SchemaError
from shared.identity import Identity, create_identity, generate_identity
from shared.job import Job, parse_job
from shared.masked_updates import check_length
from shared.payload.messages import SumOf
from shared.secure_aggregation.terms import Member, Terms
from worker_client.masking import MaskedUpdates, _append, _lines, fingerprint
from worker_client.policy import Policy, check_job, load_policy
from worker_client.remote_trunk import Boundary

PEOPLE = {name: generate_identity(name) for name in ("a", "b", "c", "d")}
SHAPES = {"w": (2, 3)}


def job_of(**sections: Any) -> Job:
    values: dict[str, Any] = {"model_name_or_path": "m", "training": {"parts": ["head", "tail"]}}
    return parse_job(values | {"cohort": {"clients": 3}} | sections, "job")


def members(people: Mapping[str, Identity] = PEOPLE) -> tuple[Member, ...]:
    return tuple(Member(name=name, public_key=people[name].public.hex()) for name in sorted(people))


def start(*listed: Member, round: int = 0, nonce: str = "5" * 64) -> Boundary:
    return Boundary(round, len(listed), {}, sum=SumOf(members=listed, nonce=nonce) if listed else None)


def masked(folder: Path, job: Job | None = None, **more: Any) -> MaskedUpdates:
    events: list[dict[str, Any]] = more.pop("events", [])
    return MaskedUpdates(job or job_of(), PEOPLE["a"], SHAPES, folder, events.append, **more)


def test_terms_follow_from_job_members_round_and_nonce(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    updates = masked(tmp_path, events=events)
    terms = updates.terms(start(*members()))
    assert isinstance(terms, Terms)
    assert (terms.length, terms.neighbours, terms.threshold) == (6, 3, 2)
    others = [updates.terms(start(*members(), round=1)), updates.terms(start(*members(), nonce="6" * 64))]
    labels = {each.label for each in (terms, *others) if each is not None}
    assert len(labels) == 3
    [event] = [event for event in events if event["event"] == "members"]
    assert (event["names"], event["fingerprint"]) == (["a", "b", "c", "d"], fingerprint(members()))


def changed(name: str) -> tuple[Member, ...]:
    return members(PEOPLE | {name: generate_identity(name)})


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (lambda: members({n: p for n, p in PEOPLE.items() if n != "a"}), "is not among the members"),
        (lambda: changed("a"), "is not among the members of its round with its own key"),
        (lambda: changed("b"), "b has another key than in an earlier round"),
        (lambda: (), "asks for this client's update in the clear"),
    ],
)
def test_members_that_must_not_be_are_refused(
    listed: Callable[[], tuple[Member, ...]], said: str, tmp_path: Path
) -> None:
    masked(tmp_path).terms(start(*members()))
    with pytest.raises(Refused, match=said) as caught:
        masked(tmp_path).terms(start(*listed(), round=1))  # another process, which finds what the first one kept
    assert caught.value.hint is not None


def test_fewer_members_than_the_quorum_are_refused(tmp_path: Path) -> None:
    job = job_of(cohort={"clients": 5, "quorum": 4})
    with pytest.raises(Refused, match=r"a round of 3 members; 4 are due \(cohort.quorum\)"):
        masked(tmp_path, job).terms(start(*members()[:3]))
    assert masked(tmp_path, job).terms(start(*members())) is not None


def test_of_replicas_each_has_its_share_of_the_clients(tmp_path: Path) -> None:
    job = job_of(cohort={"clients": 6, "replicas": 2})
    assert masked(tmp_path, job).terms(start(*members()[:3])) is not None
    with pytest.raises(Refused, match="a round of 3 members; 6 are due"):
        masked(tmp_path, job_of(cohort={"clients": 6})).terms(start(*members()[:3]))


@pytest.mark.parametrize("listed", [members()[::-1], (*members()[:3], members()[2])], ids=["order", "twice"])
def test_a_list_that_no_sum_can_have_is_refused(listed: tuple[Member, ...], tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="no masked sum among these"):
        masked(tmp_path).terms(start(*listed))


def test_where_nothing_is_masked_the_server_cannot_begin_to(tmp_path: Path) -> None:
    off = job_of(aggregation={"type": "fedavg", "secure": "off"})
    assert masked(tmp_path, off).terms(start()) is None
    with pytest.raises(SchemaError, match=r"aggregation\.secure=off"):
        masked(tmp_path, off).terms(start(*members()))


def cards(folder: Path, *names: str) -> tuple[Path, dict[str, Identity]]:
    made = {name: create_identity(folder / "keys", name) for name in names}
    (folder / "roster").mkdir()
    for name in names:
        (folder / "keys" / f"{name}.card").rename(folder / "roster" / f"{name}.card")
    return folder / "roster", made


def test_with_a_roster_nobody_else_may_be_in_the_sum(tmp_path: Path) -> None:
    roster, people = cards(tmp_path, "a", "b", "c")
    policy = tmp_path / "policy.yaml"
    policy.write_text("roster: roster\nsecure_updates: true\n")
    names = load_policy(policy).names()
    assert names is not None
    updates = MaskedUpdates(job_of(), people["a"], SHAPES, tmp_path / "out", lambda event: None, names)
    assert updates.terms(start(*members(people))) is not None
    for stranger in ({"d": PEOPLE["d"]}, {"c": PEOPLE["c"]}):
        with pytest.raises(Refused, match=r"is not in this site's roster|another key"):
            updates.terms(start(*members(people | stranger), round=1))
    (roster / "d.card").write_text("{}")
    with pytest.raises(KeyFileError):
        AllowList(roster).names()


def test_a_roster_that_is_not_there_is_said_before_anything_else(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("roster: nowhere\n")
    with pytest.raises(KeyFileError, match="nowhere"):
        load_policy(policy)


@pytest.mark.parametrize(
    ("sections", "allowed"),
    [
        ({}, True),
        ({"training": {"parts": ["trunk"]}}, True),
        ({"cohort": {"clients": 2}}, False),
        ({"aggregation": {"type": "median", "secure": "off"}}, False),
    ],
)
def test_a_policy_may_ask_that_updates_are_masked(sections: dict[str, Any], allowed: bool) -> None:
    policy = Policy(secure_updates=True)
    if allowed:
        check_job(policy, job_of(**sections))
        return
    with pytest.raises(Refused, match="its updates are not masked, and secure_updates is true: "):
        check_job(policy, job_of(**sections))
    check_job(Policy(), job_of(**sections))


def test_a_line_that_a_kill_cut_short_was_not_acted_upon(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    _append(path, {"round": 0, "clients": ["a"]})
    with path.open("a") as file:
        file.write('{"round": 1, "cli')
    assert [line["round"] for line in _lines(path)] == [0]
    _append(path, {"round": 2, "clients": ["a"]})
    assert [line["round"] for line in _lines(path)] == [0, 2]


def test_more_values_than_a_sum_can_have_are_refused_by_name() -> None:
    with pytest.raises(JobError, match="134217728 trained values") as caught:
        check_length({"w": (2**27,)})
    assert caught.value.hint is not None
    assert "aggregation.secure=off" in caught.value.hint
