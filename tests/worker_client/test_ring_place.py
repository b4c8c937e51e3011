"""A client's place in a ring: which sums it takes part in, and which it does not."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_masked_updates import PEOPLE, SHAPES, job_of, masked, members

from launcher.preflight.files import check_updates
from shared.errors import Refused, SchemaError
from shared.job import Job
from shared.payload.messages import SumOf
from shared.secure_aggregation.messages import PublicKey, RingInput, RingKey, RingKeys, RingRound
from shared.secure_aggregation.ring import RingMember
from shared.secure_aggregation.terms import RingTerms
from worker_client.masking import MaskedUpdates
from worker_client.policy import Policy, check_job
from worker_client.remote_trunk import Boundary

NONCE = "5" * 64
END = Boundary(1, 4, {})
START = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
UPDATE = {name: torch.ones(shape) for name, shape in SHAPES.items()}


def ring_job(**sections: Any) -> Job:
    return job_of(aggregation={"type": "fedavg", "secure": "ring"}, **sections)


def begin(ring: RingRound | None = None, round: int = 0, nonce: str = NONCE) -> Boundary:
    return Boundary(round, 4, {}, sum=SumOf(members=members(), nonce=nonce, ring=ring))


@dataclass
class Server:
    """Gives the others' keys, then these answers to inputs, one after the other."""

    terms: RingTerms
    answers: list[Any] = field(default_factory=list)
    came: list[tuple[Any, bytes]] = field(default_factory=list)

    def mask(self, round: int, body: Any, due: type, frames: Sequence[Any] = (), *, weight: int = 0) -> Any:
        self.came.append((body, b"".join(bytes(frame) for frame in frames)))
        if isinstance(body, RingKey):
            others = {
                number: RingMember(self.terms, PEOPLE[member.name]).advertise_key().key
                for number, member in enumerate(self.terms.members)
            }
            keys = others | {0: body.key}
            return RingKeys(keys=tuple(PublicKey(client=number, key=keys[number]) for number in sorted(keys)))
        return self.answers.pop(0)


def hand_in(updates: MaskedUpdates, boundary: Boundary, *answers: Any) -> Server:
    terms = updates.terms(boundary)
    assert isinstance(terms, RingTerms)
    assert boundary.round is not None
    server = Server(terms, list(answers))
    updates.hand_in(server, terms, boundary.round, 3, START, UPDATE)  # type: ignore[arg-type]
    return server


def test_keys_are_agreed_once_and_every_masking_of_the_same_update_is_another(tmp_path: Path) -> None:
    updates = masked(tmp_path, ring_job())
    first = hand_in(updates, begin(), RingRound(sequence=1, members=(0, 1, 2)), END)
    second = hand_in(updates, begin(RingRound(sequence=2, members=(0, 1, 2, 3)), round=1), END)
    assert [body.type for body, _ in first.came] == ["ring_key", "ring_input", "ring_input"]
    assert [body for body, _ in second.came] == [RingInput(sequence=2, words=7)]
    words = [frames for _, frames in (*first.came[1:], *second.came)]
    assert len(set(words)) == 3
    assert len({words[place][start : start + 8] for place in range(3) for start in range(0, 56, 8)}) == 21


def test_a_sum_is_done_again_among_fewer_and_no_others(tmp_path: Path) -> None:
    three = RingRound(sequence=1, members=(0, 1, 2))
    for again in ((0, 1, 2), (0, 1, 3), (0, 1, 2, 3)):
        with pytest.raises(SchemaError, match="again among others"):
            hand_in(masked(tmp_path, ring_job()), begin(), three, RingRound(sequence=2, members=again), END)


def test_a_ring_without_a_place_for_this_client_is_refused(tmp_path: Path) -> None:
    asked = RingRound(sequence=1, members=(0, 1, 2))
    with pytest.raises(SchemaError, match="no place in"):
        masked(tmp_path, ring_job()).terms(begin(asked))
    updates = masked(tmp_path, ring_job())
    hand_in(updates, begin(), END)
    with pytest.raises(SchemaError, match="no place in"):
        updates.terms(begin(asked, nonce="6" * 64))
    with pytest.raises(SchemaError, match="client 9 of 4"):
        updates.terms(begin(RingRound(sequence=1, members=(0, 1, 9))))
    with pytest.raises(Refused, match="is not among the members"):
        updates.terms(begin(RingRound(sequence=1, members=(1, 2, 3))))
    with pytest.raises(Refused, match=r"a round of 2 members; 3 are due"):
        updates.terms(begin(RingRound(sequence=1, members=(0, 1))))


def test_in_a_job_of_secagg_the_server_cannot_make_a_ring(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"the job says aggregation\.secure=secagg"):
        masked(tmp_path).terms(begin(RingRound(sequence=0, members=(0, 1, 2))))


def test_a_round_whose_sum_was_seen_is_only_summed_again_among_the_same(tmp_path: Path) -> None:
    hand_in(masked(tmp_path, ring_job()), begin(), RingRound(sequence=1, members=(0, 1, 2)), END)
    updates = masked(tmp_path, ring_job())  # another process, which finds what the first one kept
    with pytest.raises(Refused, match="round 0: this client helped to unmask a sum of this round that d was") as caught:
        hand_in(updates, begin(), END)
    assert caught.value.reason == "another_sum"
    hand_in(masked(tmp_path, ring_job()), begin(round=1), END)


def test_a_policy_takes_a_ring_for_masked_and_preflight_says_what_it_means() -> None:
    check_job(Policy(secure_updates=True), ring_job())
    shown = check_updates(ring_job())
    assert "masked (ring)" in str(vars(shown))
    assert "the two members next to a client" in str(vars(shown))
    assert "next to a client" not in str(vars(check_updates(job_of())))
