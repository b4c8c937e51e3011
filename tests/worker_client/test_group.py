"""What a client under a group's key takes from the server, and what it does not."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import AggregationError, SchemaError
from shared.group_keys import fingerprint
from shared.job import Job, parse_job
from shared.payload.messages import Sealed
from shared.sealed_averages import seal
from shared.secure_aggregation.group_key import GroupKey
from worker_client.group import Group
from worker_client.remote_trunk import Boundary

KEY = GroupKey(bytes(range(32)))
SHAPES = {"w": (2, 3), "b": (1,)}
INITIAL = {"w": torch.full((2, 3), 7.0), "b": torch.zeros(1)}


def job_of(name: str = "job") -> Job:
    values: dict[str, Any] = {"model_name_or_path": "m", "name": name, "training": {"parts": ["head", "tail"]}}
    return parse_job(
        values
        | {"cohort": {"clients": 3}, "aggregation": {"type": "fedavg", "group_key": fingerprint(KEY)}}
        | {"rounds": {"count": 5}},
        "job",
    )


def group_of(key: GroupKey = KEY, job: str = "job") -> Group:
    return Group(job_of(job), key, lambda: INITIAL)


def boundary(round: int | None, sealed: int | None, **more: Any) -> Boundary:
    if sealed is None:
        return Boundary(round, 3, {}, **more)
    box = seal(KEY, job_of().digest(), sealed, np.arange(7, dtype=np.float32) + sealed)
    return Boundary(round, 3, {}, sealed=Sealed(round=sealed), box=box, **more)


def test_a_round_begins_with_what_is_in_the_box_and_before_the_first_with_the_initial_values() -> None:
    group = group_of()
    for round in (0, 1):  # the first round may have had no sum
        assert group.opened(boundary(round, None), SHAPES).averages == INITIAL
    opened = group.opened(boundary(3, 2), SHAPES)  # nor the third
    assert torch.equal(opened.averages["b"], torch.tensor([2.0]))
    assert torch.equal(opened.averages["w"], torch.tensor([[3.0, 4, 5], [6, 7, 8]]))
    assert {value.dtype for value in opened.averages.values()} == {torch.float32}
    assert torch.equal(group.opened(boundary(None, 5), SHAPES).averages["b"], torch.tensor([5.0]))


@pytest.mark.parametrize("what", ["averages", "control", "residuals"])
def test_averages_in_the_clear_are_refused(what: str) -> None:
    clear = replace(Boundary(1, 3, {}), **{what: INITIAL})  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match=r"the job keeps them from it \(aggregation.group_key\)"):
        group_of().opened(clear, SHAPES)


def test_averages_of_a_round_to_come_or_of_one_long_gone_are_refused() -> None:
    group = group_of()
    with pytest.raises(SchemaError, match="sealed averages for round 3, and round 2 begins"):
        group.opened(boundary(2, 3), SHAPES)
    group.opened(boundary(3, 3), SHAPES)
    for older in (2, None):
        with pytest.raises(SchemaError, match="once more, after those of round 3"):
            group.opened(boundary(4, older), SHAPES)
    group.opened(boundary(2, 2), SHAPES)  # the server lost its last checkpoint, and goes back with it


@pytest.mark.parametrize("group", [group_of(GroupKey(bytes(32))), group_of(job="another")], ids=["key", "job"])
def test_a_box_of_another_key_or_job_does_not_open(group: Group) -> None:
    with pytest.raises(AggregationError, match="do not open under this group's key") as caught:
        group.opened(boundary(1, 1), SHAPES)
    assert caught.value.hint is not None


def test_a_box_moved_to_another_round_does_not_open() -> None:
    moved = boundary(2, 1)
    with pytest.raises(AggregationError, match="with which round 2 begins"):
        group_of().opened(Boundary(2, 3, {}, sealed=Sealed(round=2), box=moved.box), SHAPES)
