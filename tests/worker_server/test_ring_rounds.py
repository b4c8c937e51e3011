"""Sums in a ring in the state machines of rounds, with real members of the library, without I/O."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from test_masked_rounds import KEYS, NAMES, SHAPES, job_of, mean_of

from shared.errors import AggregationError, JobError, PhaseError
from shared.identity import generate_identity
from shared.job import Job, parse_job
from shared.masked_updates import ring_terms_of
from shared.payload.messages import Mask, SumOf
from shared.secure_aggregation.messages import AdvertiseKeys, RingInput, RingKey, RingKeys, RingRound
from shared.secure_aggregation.ring import RingMember
from worker_server.plain_fedavg import PlainFedavg
from worker_server.ring import Rings
from worker_server.server import make_rounds
from worker_server.work import Aggregate, Bind, Dismiss, Instruction, Refuse, Relay, StartRound, SumFailed, Ticket

PEOPLE = KEYS | {"emil": generate_identity("emil")}
LEFT = ("anna", "clara", "dora")


@dataclass
class Client:
    """With its library object, which lives as long as its session; its place and a quarter of it are its update."""

    name: str
    place: int
    sessions: int = 0
    member: RingMember | None = None
    asked: RingRound | None = None

    @property
    def ticket(self) -> Ticket:
        session = f"{self.name}-{self.sessions}".encode().ljust(16)
        return Ticket(session, self.name, 7, None, public=PEOPLE[self.name].public)


@dataclass
class Play:
    """Rounds of plain FedAvg and their clients: all that happens is the sum."""

    job: Job
    now: float = 0.0
    rounds: PlainFedavg = field(init=False)
    clients: dict[str, Client] = field(init=False)
    done: list[Instruction] = field(default_factory=list)
    ended: list[Aggregate] = field(default_factory=list)
    words: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        rounds = make_rounds(self.job, 0, sums=Rings(self.job, SHAPES))
        assert isinstance(rounds, PlainFedavg)
        self.rounds = rounds
        self.clients = {name: Client(name, place) for place, name in enumerate(PEOPLE, 1)}

    def carry(self, instructions: list[Instruction]) -> None:
        self.done += instructions
        for instruction in instructions:
            match instruction:
                case StartRound(_, answers, SumOf() as announced):
                    for ticket in answers:
                        self.begin(self.clients[ticket.client], announced)
                case Relay(answered):
                    for ticket, body in answered:
                        self.answered(self.clients[ticket.client], body)
                case Aggregate():
                    self.ended.append(instruction)

    def begin(self, client: Client, announced: SumOf) -> None:
        client.asked = announced.ring
        if announced.ring is None:
            terms = ring_terms_of(self.job, SHAPES, announced.members, announced.nonce)
            client.member = RingMember(terms, PEOPLE[client.name])

    def answered(self, client: Client, body: Any) -> None:
        if isinstance(body, RingKeys):
            assert client.member is not None
            client.member.connect(body)
            body = RingRound(sequence=0, members=tuple(entry.client for entry in body.keys))
        client.asked = body

    def join(self, *names: str) -> None:
        """With a session each has not had before."""
        for name in names:
            self.clients[name].sessions += 1
            self.carry(self.rounds.joined(self.clients[name].ticket, self.now))

    def leave(self, *names: str) -> None:
        for name in names:
            self.carry(self.rounds.left(self.clients[name].ticket.session, self.now))

    def send(self, name: str, body: Any, frames: Any = (), round: int | None = None) -> list[Any]:
        message = Mask(request=7, round=self.rounds.round if round is None else round, body=body)
        answers = self.rounds.mask(self.clients[name].ticket, message, frames, self.now)
        self.carry(answers)
        return answers

    def key(self, *names: str) -> None:
        for name in names:
            member = self.clients[name].member
            assert member is not None
            self.send(name, member.advertise_key())

    def input(self, *names: str) -> None:
        for name in names:
            client = self.clients[name]
            assert client.member is not None
            assert client.asked is not None
            values = np.full(7, 0.25 * client.place, np.float32)
            message, words = client.member.mask_input(client.asked, values, client.place)
            self.words.append(words.tobytes())
            self.send(name, message, [words.data])

    def finish(self) -> tuple[float, int]:
        """The mean of the values, which all are the same, and the weight; the round is over."""
        [work] = self.ended
        assert work.sum is not None
        summed = work.sum.finish()
        assert summed is not None
        values = torch.cat([value.flatten() for value in summed.delta.values()])
        assert float(values.max() - values.min()) == 0.0
        self.ended.clear()
        self.carry(self.rounds.aggregation_done())
        return float(values[0]), summed.weight

    def of(self, kind: type) -> list[Any]:
        return [instruction for instruction in self.done if isinstance(instruction, kind)]

    @property
    def started(self) -> StartRound:
        start: StartRound = self.of(StartRound)[-1]
        return start


def begun(rounds: int = 3, quorum: int | None = None, clients: int = 4) -> Play:
    job = job_of(clients, quorum, secure="ring")
    play = Play(job.model_copy(update={"rounds": job.rounds.model_copy(update={"count": rounds})}))
    play.join(*NAMES)
    return play


def test_keys_once_then_one_request_a_round() -> None:
    play = begun()
    play.key(*NAMES)
    nonces = set()
    for round in range(3):
        assert play.started.sum is not None
        nonces.add(play.started.sum.nonce)
        play.input(*NAMES)
        assert play.of(Bind)[-1] == Bind(round, NAMES)
        assert play.finish() == pytest.approx(mean_of(NAMES))
    assert len(nonces) == 1
    assert len(play.of(Relay)) == 1
    assert [start.sum.ring for start in play.of(StartRound)] == [
        None,
        RingRound(sequence=1, members=(0, 1, 2, 3)),
        RingRound(sequence=2, members=(0, 1, 2, 3)),
    ]
    assert len(set(play.words)) == 12


@pytest.mark.parametrize("late", [False, True], ids=["leaves", "is late"])
@pytest.mark.parametrize("ringed", [False, True], ids=["first round", "ring is there"])
def test_who_is_lost_before_its_input_came_costs_the_sum_and_the_others_send_again(late: bool, ringed: bool) -> None:
    play = begun(quorum=3)
    play.key(*NAMES)
    if ringed:
        play.input(*NAMES)
        play.finish()
    play.words.clear()
    play.input("anna", "clara")
    if late:
        play.now = 10
        play.input("dora")  # in time: berta alone is late
        play.carry(play.rounds.tick(play.now))
        assert play.of(Dismiss) == [Dismiss((play.clients["berta"].ticket.session,), late=True)]
        assert play.done.index(play.of(Dismiss)[0]) < play.done.index(play.of(Relay)[-1])
    else:
        play.leave("berta")
        play.input("dora")
        assert play.of(Dismiss) == []
    assert play.ended == []
    asked = play.of(Relay)[-1].answers
    assert [(ticket.client, body) for ticket, body in asked] == [
        (name, RingRound(sequence=1 + ringed, members=(0, 2, 3))) for name in LEFT
    ]
    play.input(*LEFT)
    assert play.of(Bind)[-1] == Bind(int(ringed), LEFT)
    assert play.finish() == pytest.approx(mean_of(LEFT))
    assert len(set(play.words)) == 6
    assert play.of(SumFailed) == []
    # The next round is among those of the ring that are left, with the same keys.
    assert play.started.sum is not None
    assert play.started.sum.ring == RingRound(sequence=2 + ringed, members=(0, 2, 3))
    play.input(*LEFT)
    assert play.finish() == pytest.approx(mean_of(LEFT))


def test_the_input_of_a_member_that_left_after_it_counts() -> None:
    play = begun(quorum=3)
    play.key(*NAMES)
    play.input("berta", "anna")
    play.leave("berta")
    play.input("clara", "dora")
    assert play.finish() == pytest.approx(mean_of(NAMES))


def test_who_left_after_its_input_is_not_asked_again() -> None:
    """Of five, berta leaves before her input, anna after hers: the sum is done again among the three that are left."""
    play = begun(quorum=3, clients=5)
    play.join("emil")
    play.key(*NAMES, "emil")
    play.input("anna")
    play.leave("berta", "anna")
    left = ("clara", "dora", "emil")
    play.input(*left)
    assert [ticket.client for ticket, _ in play.of(Relay)[-1].answers] == list(left)
    play.input(*left)
    assert play.of(Bind) == [Bind(0, left)]
    mean, weight = play.finish()
    assert mean == pytest.approx(0.25 * (9 + 16 + 25) / 12)
    assert weight == 12


def test_with_too_few_left_the_round_begins_anew_with_another_ring() -> None:
    play = begun(quorum=3)
    play.key(*NAMES)
    play.input("anna")
    play.leave("berta", "anna")
    [dismissed] = play.of(Dismiss)
    assert set(dismissed.sessions) == {play.clients[name].ticket.session for name in ("clara", "dora")}
    play.leave("clara", "dora")
    play.join(*LEFT)
    assert play.started.round == 0
    assert play.started.sum is not None
    assert play.started.sum.ring is None
    play.key(*LEFT)
    play.input(*LEFT)
    assert play.finish() == pytest.approx(mean_of(LEFT))


def test_with_all_needed_the_round_begins_anew_with_another_ring_when_all_are_back() -> None:
    play = begun()
    play.key(*NAMES)
    play.input(*LEFT)
    play.leave("berta")
    assert len(play.of(Dismiss)) == 1
    play.leave(*LEFT)
    play.join(*LEFT)
    assert len(play.of(StartRound)) == 1
    play.join("berta")
    play.key(*NAMES)
    play.input(*NAMES)
    assert play.finish() == pytest.approx(mean_of(NAMES))
    assert len(set(play.words)) == 7


def test_who_is_new_or_was_started_again_makes_the_ring_anew() -> None:
    play = begun(rounds=4, quorum=3)
    play.key(*NAMES)
    play.input(*NAMES)
    play.leave("berta")
    play.join("berta")
    play.finish()
    assert play.started.sum is not None
    assert play.started.sum.ring is None
    assert [member.name for member in play.started.sum.members] == list(NAMES)
    play.key(*NAMES)
    play.input(*NAMES)
    assert play.finish() == pytest.approx(mean_of(NAMES))


def test_a_server_that_was_killed_with_all_inputs_waits_for_the_same_members() -> None:
    job = job_of(quorum=3, secure="ring")
    rounds = make_rounds(job, 0, sums=Rings(job, SHAPES), bound=frozenset(LEFT))
    tickets = {name: Ticket(name.encode(), name, 1, None, public=PEOPLE[name].public) for name in NAMES}
    assert [rounds.joined(tickets[name], 0) for name in ("berta", "anna", "clara")] == [[], [], []]
    [start] = rounds.joined(tickets["dora"], 0)
    assert isinstance(start, StartRound)
    assert start.sum is not None
    assert [member.name for member in start.sum.members] == list(LEFT)


def test_words_that_do_not_add_up_end_the_round_without_its_sum() -> None:
    play = begun()
    play.key(*NAMES)
    play.input(*NAMES[1:])
    play.send("anna", RingInput(sequence=0, words=8), [b"\x55" * 64])
    [work] = play.ended
    assert work.sum is not None
    with pytest.raises(AggregationError) as caught:
        work.sum.finish()
    play.carry(play.rounds.aggregation_done(caught.value))
    [failed] = play.of(SumFailed)
    assert (failed.round, failed.barred, play.rounds.round) == (0, (), 1)
    play.input(*NAMES)
    play.ended.pop(0)
    assert play.finish() == pytest.approx(mean_of(NAMES))


def test_a_message_out_of_turn_repeated_or_of_the_wrong_size_is_refused_and_changes_nothing() -> None:
    play = begun()
    words = RingInput(sequence=0, words=8)
    for body, frames, code in (
        (words, [bytes(64)], "phase"),
        (AdvertiseKeys(sealing=bytes(range(32)), masking=bytes(range(32))), (), "phase"),
        (RingKey(key=bytes(32)), (), "schema"),
    ):
        [refused] = play.send("anna", body, frames)
        assert (refused.code, play.rounds.updates) == (code, {})
    play.key(*NAMES)
    for body, frames, code in (
        (words, [bytes(63)], "tensor"),
        (RingInput(sequence=0, words=9), [bytes(64)], "schema"),
        (RingInput(sequence=1, words=8), [bytes(64)], "phase"),
        (RingKey(key=bytes(range(32))), (), "phase"),
    ):
        [refused] = play.send("anna", body, frames)
        assert (refused.code, play.rounds.updates) == (code, {})
    play.input("anna")
    [refused] = play.send("anna", words, [bytes(64)])
    assert refused.code == "repeated"
    play.input(*NAMES[1:])
    assert play.finish() == pytest.approx(mean_of(NAMES))


def test_the_input_of_a_void_sum_is_refused_in_the_one_that_follows() -> None:
    play = begun(quorum=3)
    play.key(*NAMES)
    client = play.clients["berta"]
    assert client.member is not None
    assert client.asked is not None
    late, words = client.member.mask_input(client.asked, np.zeros(7, np.float32), 1)
    play.input(*LEFT)
    play.leave("berta")
    [refused] = play.send("berta", late, [words.data])
    assert isinstance(refused, Refuse)
    play.input(*LEFT)
    assert play.finish() == pytest.approx(mean_of(LEFT))
    with pytest.raises(PhaseError):  # nor would berta give it again
        client.member.mask_input(client.asked, np.zeros(7, np.float32), 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cohort": {"clients": 5, "sampled": 3}}, "cohort.sampled=3 draws another each round"),
        ({"cohort": {"clients": 2}}, "aggregation.secure=ring needs rounds of 3 clients at least"),
        ({"cohort": {"clients": 5, "quorum": 2}}, "cohort.quorum is 2"),
        ({"cohort": {"clients": 5, "replicas": 2}}, "cohort.replicas=2 leave one 2 of cohort.clients=5"),
        ({"aggregation": {"type": "median"}}, "which aggregation.secure=ring hides"),
        ({"aggregation": {"max_update_norm": 1.0}}, "which aggregation.secure=ring hides"),
        ({"wire": {"update_density": 0.1}}, "which aggregation.secure=ring cannot mask"),
        ({"training": {"parts": ["trunk"]}}, "aggregation.secure=ring has nothing to mask"),
    ],
)
def test_what_a_ring_contradicts_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    values = {"model_name_or_path": "m", "training": {"parts": ["head", "tail"]}, "cohort": {"clients": 3}} | change
    values["aggregation"] = {"type": "fedavg", **change.get("aggregation", {}), "secure": "ring"}
    with pytest.raises(JobError) as caught:
        parse_job(values, "job.yaml")
    assert said in caught.value.message


def test_a_quorum_that_no_threshold_could_serve_is_enough_for_a_ring() -> None:
    job = job_of(clients=10, quorum=3, secure="ring")
    members = {name: PEOPLE[name].public for name in NAMES}
    terms = Rings(job, SHAPES).begin(0, members, {name: name.encode() for name in NAMES}).terms
    assert terms.minimum == 3
