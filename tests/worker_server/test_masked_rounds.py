"""Masked sums in the state machines of rounds, with real clients of the library, without I/O."""

import contextlib
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared import flat
from shared.errors import AggregationError, JobError, PhaseError, ShareError
from shared.group_keys import fingerprint
from shared.identity import Identity, generate_identity
from shared.job import Job, load_job, parse_job
from shared.masked_updates import flat_difference, terms_of
from shared.payload.messages import Mask, Objection, Sealed, SumOf, Unopened
from shared.sealed_averages import box_bytes
from shared.secure_aggregation.client import Client
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.messages import (
    AdvertiseKeys,
    GroupSum,
    KeyList,
    MaskedInput,
    RelayedShares,
    Unmask,
    UnmaskRequest,
)
from worker_server.masking import Sums
from worker_server.plain_fedavg import PlainFedavg
from worker_server.rounds import Plan
from worker_server.server import make_rounds
from worker_server.work import (
    Aggregate,
    Bind,
    Dismiss,
    Finish,
    Instruction,
    Refuse,
    Relay,
    StartRound,
    SumFailed,
    Ticket,
)

NAMES = ("anna", "berta", "clara", "dora")
SHAPES = {"head.b": (3,), "head.a": (2, 2)}
KEYS = {name: generate_identity(name) for name in NAMES}
GROUP = GroupKey(bytes(range(32)))


def job_of(clients: int = 4, quorum: int | None = None, **aggregation: Any) -> Job:
    values = {"model_name_or_path": "m", "split": {"trunk": "client"}, "rounds": {"count": 2, "local_steps": 1}}
    return parse_job(
        values
        | {
            "cohort": {"clients": clients, "quorum": quorum, "deadline_s": 10},
            "aggregation": {"type": "fedavg", **aggregation},
        },
        "job",
    )


@dataclass
class Member:
    """One client with its library object; `value` is everywhere in its update."""

    name: str
    value: float
    weight: int
    client: Client | None = None
    inbox: Any = None
    frames: Any = ()

    @property
    def session(self) -> bytes:
        return self.name.encode().ljust(16)

    def ticket(self, request: int = 1) -> Ticket:
        return Ticket(self.session, self.name, request, None, public=KEYS[self.name].public)


@dataclass
class Play:
    """Rounds of plain FedAvg and their clients: all that happens is the masked sum."""

    job: Job
    now: float = 0.0
    rounds: PlainFedavg = field(init=False)
    members: dict[str, Member] = field(init=False)
    done: list[Instruction] = field(default_factory=list)
    ended: list[Aggregate] = field(default_factory=list)

    def __post_init__(self) -> None:
        rounds = make_rounds(self.job, 0, sums=Sums(self.job, SHAPES))
        assert isinstance(rounds, PlainFedavg)
        self.rounds = rounds
        self.members = {n: Member(n, 0.25 * place, place) for place, n in enumerate(NAMES, 1)}

    def join(self, *names: str) -> None:
        for name in names:
            self.carry(self.rounds.joined(self.members[name].ticket(), self.now))

    def carry(self, instructions: list[Instruction]) -> None:
        self.done += instructions
        for instruction in instructions:
            match instruction:
                case StartRound(round_, answers, SumOf() as announced):
                    terms = terms_of(self.job, SHAPES, announced.members, round_, announced.nonce)
                    for ticket in answers:
                        group = GROUP if terms.group_key else None
                        self.members[ticket.client].client = Client(terms, KEYS[ticket.client], group=group)
                        self.members[ticket.client].inbox = None
                case Relay(answered, frames):
                    for ticket, body in answered:
                        self.members[ticket.client].inbox = body
                        self.members[ticket.client].frames = frames
                case Aggregate():
                    self.ended.append(instruction)

    def send(self, name: str, body: Any, frames: Any = (), round: int | None = None) -> list[Any]:
        message = Mask(request=7, round=self.rounds.round if round is None else round, body=body)
        answers = self.rounds.mask(self.members[name].ticket(7), message, frames, self.now)
        self.carry(answers)
        return answers

    def advertise(self, *names: str) -> None:
        for name in names:
            client = self.members[name].client
            assert client is not None
            self.send(name, client.advertise_keys())

    def share(self, *names: str) -> None:
        for name in names:
            member = self.members[name]
            assert member.client is not None
            self.send(name, member.client.share_keys(member.inbox))

    def input(self, *names: str) -> None:
        for name in names:
            member = self.members[name]
            assert member.client is not None
            try:
                values = np.full(7, member.value, np.float32)
                message, words = member.client.mask_input(member.inbox, values, member.weight)
            except ShareError as error:
                self.send(name, Objection(client=sorted(NAMES).index(error.clients[0])))
            else:
                self.send(name, message, [words.data])

    def unmask(self, *names: str) -> None:
        for name in names:
            member = self.members[name]
            assert member.client is not None
            self.send(name, member.client.unmask(member.inbox))

    def leave(self, *names: str) -> None:
        for name in names:
            self.carry(self.rounds.left(self.members[name].session, self.now))

    def uncover(self) -> None:
        """As the compute thread does first, under a group's key."""
        [work] = self.ended
        assert work.sum is not None
        assert work.sum.finish() is None
        self.ended.clear()
        self.carry(self.rounds.uncovered(self.now))

    @property
    def opener(self) -> str:
        """Who was asked last."""
        [(ticket, body)] = self.of(Relay)[-1].answers
        assert isinstance(body, GroupSum)
        return str(ticket.client)

    def seal(self, name: str) -> tuple[float, int]:
        """The mean that this client reads from the sum; some box goes back."""
        member = self.members[name]
        assert member.client is not None
        mean, weight = member.client.open_sum(member.inbox, np.frombuffer(member.frames[0], np.uint64).copy())
        self.send(name, Sealed(round=self.rounds.round + 1), [name.encode().ljust(box_bytes(7))])
        return float(mean[0]), weight

    def box(self) -> str:
        """Who made the box that the round ends with; it is over."""
        [work] = self.ended
        assert work.sum is not None
        summed = work.sum.finish()
        assert summed is not None
        assert summed.box is not None
        assert (summed.delta, summed.box.round) == ({}, self.rounds.round + 1)
        self.ended.clear()
        self.carry(self.rounds.aggregation_done())
        return bytes(summed.box.frame).decode().rstrip()

    def finish(self) -> tuple[float, int]:
        """The mean of the values, which all are the same, and the weight; the round is over."""
        [work] = self.ended
        assert work.sum is not None
        summed = work.sum.finish()
        assert summed is not None
        values = torch.cat([value.flatten() for value in summed.delta.values()])
        assert float(values.max() - values.min()) == 0.0
        assert {name: tuple(value.shape) for name, value in summed.delta.items()} == SHAPES
        self.ended.clear()
        self.carry(self.rounds.aggregation_done())
        return float(values[0]), summed.weight

    def fail(self) -> AggregationError:
        """As the compute thread does."""
        [work] = self.ended
        assert work.sum is not None
        with pytest.raises(AggregationError) as caught:
            work.sum.finish()
        self.ended.clear()
        self.carry(self.rounds.aggregation_done(caught.value))
        return caught.value

    def of(self, kind: type) -> list[Any]:
        return [instruction for instruction in self.done if isinstance(instruction, kind)]


def mean_of(names: Collection[str]) -> tuple[float, int]:
    places = [NAMES.index(name) + 1 for name in names]
    return sum(0.25 * place * place for place in places) / sum(places), sum(places)


def started(**settings: Any) -> Play:
    play = Play(job_of(**settings))
    play.join(*NAMES)
    return play


PHASES = ("advertise", "share", "input", "unmask")


def advance(play: Play, until: str, names: Collection[str] = NAMES) -> None:
    """All phases before `until`."""
    for phase in PHASES[: PHASES.index(until)]:
        getattr(play, phase)(*names)


def rest(play: Play, since: str, names: Collection[str]) -> None:
    for phase in PHASES[PHASES.index(since) :]:
        getattr(play, phase)(*names)


def test_four_phases_give_the_mean_and_the_next_round() -> None:
    play = started()
    rest(play, "advertise", NAMES)
    assert [len(relay.answers) for relay in play.of(Relay)] == [4, 4, 4]
    assert play.of(Bind) == [Bind(0, NAMES)]
    assert play.finish() == pytest.approx(mean_of(NAMES))
    [_, again] = play.of(StartRound)
    assert (again.round, [ticket.client for ticket in again.answers]) == (1, list(NAMES))
    assert all(ticket.refused is None for ticket in again.answers)
    assert again.sum.nonce != play.of(StartRound)[0].sum.nonce
    rest(play, "advertise", NAMES)
    play.finish()
    assert len(play.of(Finish)) == 1


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("late", [False, True], ids=["leaves", "is late"])
def test_with_a_quorum_below_the_clients_the_sum_goes_on_without_whoever_is_lost(phase: str, late: bool) -> None:
    """In its last phase the lost member's update is in the sum already."""
    play = started(quorum=3)
    advance(play, phase)
    left = [name for name in NAMES if name != "berta"]
    getattr(play, phase)(*left)
    if late:
        play.now = 9.9
        play.carry(play.rounds.tick(play.now))
        assert play.ended == []
        assert play.rounds.deadline() == 10
        play.now = 10
        play.carry(play.rounds.tick(play.now))
    else:
        play.leave("berta")
    if phase != "unmask":
        rest(play, PHASES[PHASES.index(phase) + 1], left)
    assert play.finish() == pytest.approx(mean_of(NAMES if phase == "unmask" else left))
    assert play.of(SumFailed) == []
    assert play.of(Dismiss) == []


@pytest.mark.parametrize("phase", PHASES)
def test_with_all_needed_the_round_begins_anew_when_all_are_back(phase: str) -> None:
    play = started()
    advance(play, phase)
    left = [name for name in NAMES if name != "berta"]
    getattr(play, phase)(*left)
    play.leave("berta")
    assert len(play.of(Dismiss)) == 1
    play.leave(*left)
    play.join(*left)
    assert len(play.of(StartRound)) == 1
    play.join("berta")
    assert [start.round for start in play.of(StartRound)] == [0, 0]
    rest(play, "advertise", NAMES)
    assert play.finish() == pytest.approx(mean_of(NAMES))


def test_once_asked_to_unmask_a_round_is_only_done_again_among_the_same() -> None:
    """Three are needed, another is there in place of one of them: it waits for the next round."""
    play = Play(job_of(clients=3))
    play.join("anna", "berta", "clara")
    advance(play, "unmask", NAMES[:3])
    play.unmask("anna")
    play.leave("berta")
    play.leave("anna", "clara")
    play.join("anna", "clara", "dora")
    assert len(play.of(StartRound)) == 1
    play.join("berta")
    assert [ticket.client for ticket in play.of(StartRound)[-1].answers] == ["anna", "berta", "clara"]
    rest(play, "advertise", NAMES[:3])
    assert play.finish() == pytest.approx(mean_of(NAMES[:3]))
    assert [ticket.client for ticket in play.of(StartRound)[-1].answers] == list(NAMES)


def test_a_server_that_was_killed_while_it_unmasked_waits_for_the_same_members() -> None:
    job = job_of(clients=4, quorum=3)
    rounds = make_rounds(job, 0, sums=Sums(job, SHAPES), bound=frozenset(NAMES[:3]))
    tickets = [Ticket(name.encode(), name, 1, None, public=KEYS[name].public) for name in NAMES]
    assert [rounds.joined(ticket, 0) for ticket in (tickets[3], tickets[0], tickets[1])] == [[], [], []]
    [start] = rounds.joined(tickets[2], 0)
    assert isinstance(start, StartRound)
    assert start.sum is not None
    assert [member.name for member in start.sum.members] == list(NAMES[:3])


def test_it_does_not_wait_for_them_for_ever_if_fewer_suffice() -> None:
    """Then it ends without its sum, as it would have, had they been lost while it was unmasked."""
    job = job_of(clients=4, quorum=3)
    rounds = make_rounds(job, 0, sums=Sums(job, SHAPES), bound=frozenset(NAMES))
    tickets = [Ticket(name.encode(), name, 1, None, public=KEYS[name].public) for name in NAMES]
    for ticket in tickets[:2]:
        assert rounds.joined(ticket, 0) == []
    assert rounds.wait_no_longer() == []  # too few for any round
    assert rounds.joined(tickets[3], 0) == []
    failed, aggregate = rounds.wait_no_longer()
    assert isinstance(failed, SumFailed)
    assert "clara, not back in time" in failed.reason
    assert isinstance(aggregate, Aggregate)
    assert (aggregate.round, aggregate.updates, aggregate.sum) == (0, (), None)
    started = rounds.aggregation_done() or rounds.wait_no_longer() or rounds.joined(tickets[2], 0)
    assert isinstance(started[0], StartRound)
    assert started[0].round == 1


def test_nor_where_others_are_there_in_their_place() -> None:
    job = job_of(clients=4, quorum=3)
    rounds = make_rounds(job, 0, sums=Sums(job, SHAPES), bound=frozenset(("anna", "berta", "clara", "gone")))
    for name in ("anna", "berta", "dora"):
        rounds.joined(Ticket(name.encode(), name, 1, None, public=KEYS[name].public), 0)
    assert [type(each) for each in rounds.wait_no_longer()] == [SumFailed, Aggregate]


def test_it_waits_if_all_are_needed() -> None:
    job = job_of(clients=4)
    rounds = make_rounds(job, 1, sums=Sums(job, SHAPES), bound=frozenset(NAMES))
    for name in NAMES[:3]:
        rounds.joined(Ticket(name.encode(), name, 1, None, public=KEYS[name].public), 0)
    assert rounds.wait_no_longer() == []
    assert rounds.awaited == [NAMES[3]]


@pytest.mark.parametrize("phase", PHASES[:3])
def test_it_goes_on_with_nobody_less_though_fewer_would_suffice(phase: str) -> None:
    play = Play(job_of(quorum=3))
    play.rounds.bound = frozenset(NAMES)
    play.join(*NAMES)
    advance(play, phase)
    play.leave("berta")
    assert len(play.of(Dismiss)) == 1
    assert play.of(Bind) == []


def test_nor_with_somebody_left_out() -> None:
    play = Play(job_of(quorum=3))
    play.rounds.bound = frozenset(NAMES)
    play.join(*NAMES)
    play.advertise(*NAMES)
    garble(play, "berta", ["dora"])
    play.share("anna", "clara", "dora")
    play.input(*NAMES)
    assert play.of(Bind) == []
    assert [failed.barred for failed in play.of(SumFailed)] == [()]
    assert len(play.of(Dismiss)) == 1


def test_too_few_left_to_unmask_ends_a_round_that_does_not_need_all_without_its_sum() -> None:
    """It is not done again: a sum among fewer would differ from this one by an update."""
    play = started(quorum=3)
    advance(play, "unmask")
    play.unmask("anna", "berta")
    play.leave("clara", "dora")
    error = play.fail()
    assert "too few" in error.message
    [failed] = play.of(SumFailed)
    assert (failed.round, failed.barred) == (0, ())
    assert play.rounds.round == 1
    play.join("clara")
    start = play.of(StartRound)[-1]
    refused = {ticket.client: ticket.refused for ticket in start.answers}
    assert refused == {"anna": "the masked sum could not be had", "berta": refused["anna"], "clara": None}


def garble(play: Play, dealer: str, holders: Collection[str]) -> None:
    """What `dealer` seals for `holders` does not open."""
    member = play.members[dealer]
    assert member.client is not None
    shares = member.client.share_keys(member.inbox)
    numbers = {NAMES.index(name) for name in holders}
    bad = tuple(
        entry.model_copy(update={"box": bytes(len(entry.box))}) if entry.client in numbers else entry
        for entry in shares.shares
    )
    play.send(dealer, shares.model_copy(update={"shares": bad}))


def test_whoever_deals_shares_that_nobody_can_open_is_barred_and_the_others_begin_anew() -> None:
    play = started(quorum=3)
    play.advertise(*NAMES)
    garble(play, "berta", NAMES)
    play.share("anna", "clara", "dora")
    play.input(*NAMES)
    [failed] = play.of(SumFailed)
    assert failed.barred == ("berta",)
    left = ["anna", "clara", "dora"]
    play.leave(*NAMES)
    play.join(*NAMES)
    assert play.of(Refuse)[-1].code == "share"
    assert [ticket.client for ticket in play.of(StartRound)[-1].answers] == left
    rest(play, "advertise", left)
    assert play.finish() == pytest.approx(mean_of(left))


def test_one_objection_leaves_its_sender_out_where_the_others_suffice() -> None:
    play = started(quorum=3)
    play.advertise(*NAMES)
    garble(play, "berta", ["dora"])
    play.share("anna", "clara", "dora")
    play.input(*NAMES)
    left = ["anna", "berta", "clara"]
    play.unmask(*left)
    assert play.finish() == pytest.approx(mean_of(left))
    refused = {ticket.client: ticket.refused for ticket in play.of(StartRound)[-1].answers}
    assert set(refused) == set(NAMES)
    assert [name for name, why in refused.items() if why] == ["dora"]


def test_shares_that_were_not_dealt_are_named_and_not_used() -> None:
    """One wrong holder is too many for a threshold of all others: the round ends without its sum, the liar is out."""
    play = Play(job_of(clients=3))
    play.join("anna", "berta", "clara")
    advance(play, "unmask", NAMES[:3])
    play.unmask("anna", "clara")
    client = play.members["berta"].client
    assert client is not None
    honest = client.unmask(play.members["berta"].inbox)
    wrong = tuple(share.model_copy(update={"share": bytes(33)}) for share in honest.self_shares)
    play.send("berta", honest.model_copy(update={"self_shares": wrong}))
    play.fail()
    assert play.of(SumFailed)[-1].barred == ("berta",)
    assert play.of(Refuse)[-1].code == "share"
    play.join("dora")
    start = play.of(StartRound)[-1]
    assert (start.round, [ticket.client for ticket in start.answers]) == (1, ["anna", "clara", "dora"])


def wander(play: Play, draw: random.Random, absent: set[str]) -> None:
    """One event, due or not: somebody goes on, leaves, comes or says something odd; time passes; a sum is unmasked."""
    name = draw.choice(NAMES)
    client, inbox = play.members[name].client, play.members[name].inbox
    match draw.randrange(50):
        case 0:
            play.leave(name)
            absent.add(name)
        case 1 | 2 | 3 | 4 | 5 | 6:
            play.join(name)
            absent.discard(name)
        case 7:
            play.now += draw.uniform(0, 8)
            play.carry(play.rounds.tick(play.now))
        case 8:
            play.send(name, Objection(client=draw.randrange(5)))
        case 9:
            play.send(name, draw.choice([MaskedInput(words=8), Unmask(self_shares=(), key_shares=())]), [bytes(64)])
        case 10 | 11 if play.ended:
            finish(play)
        case _ if client is not None and name not in absent:
            step(play, name, inbox)


def step(play: Play, name: str, inbox: Any) -> None:
    """What this member's client would do next, if it can."""
    phases = {KeyList: play.share, RelayedShares: play.input, UnmaskRequest: play.unmask, type(None): play.advertise}
    with contextlib.suppress(PhaseError, AggregationError):
        phases[type(inbox)](name)


def finish(play: Play) -> None:
    """As the compute thread does, whatever comes of it."""
    [work] = play.ended
    play.ended.clear()
    failure = None
    if work.sum is not None:
        try:
            summed = work.sum.finish()
        except AggregationError as error:
            failure = error
        else:
            assert summed is not None
            assert summed.weight == mean_of(summed.contributors)[1]
            assert len(summed.contributors) >= 3
    play.carry(play.rounds.aggregation_done(failure))


@pytest.mark.parametrize("quorum", [3, 4])
def test_no_order_of_events_breaks_it_and_members_that_go_on_reach_the_end(quorum: int) -> None:
    """And of a round that members were asked to unmask there is no sum of others."""
    happened: Counter[str] = Counter()
    for seed in range(20):
        draw = random.Random(seed)
        play = Play(job_of(quorum=quorum))
        absent: set[str] = set()
        play.join(*NAMES)
        for _ in range(200):
            wander(play, draw, absent)
            play.carry(play.rounds.tick(play.now))
            due = play.rounds.deadline()
            assert due is None or due > play.now
        settled: dict[int, set[str]] = {}
        for bind in play.of(Bind):
            assert settled.setdefault(bind.round, set(bind.clients)) == set(bind.clients)
        play.rounds.barred.clear()  # as if the server were started again
        for _ in range(60):
            if play.rounds.stage == "finished":
                break
            if play.ended:
                finish(play)
            for name in NAMES:
                if play.rounds.stage == "waiting" or play.members[name].session not in play.rounds.active:
                    play.join(name)
                if play.members[name].session in play.rounds.active:
                    step(play, name, play.members[name].inbox)
            play.now += 4
            play.carry(play.rounds.tick(play.now))
        assert play.rounds.stage == "finished"
        happened.update(type(instruction).__name__ for instruction in play.done)
    assert all(happened[kind] > 5 for kind in ("Relay", "Bind", "Dismiss", "Refuse"))
    assert happened["Aggregate"] == 40


def test_a_message_out_of_turn_repeated_or_of_the_wrong_size_is_refused_and_changes_nothing() -> None:
    play = started(quorum=3)
    keys = AdvertiseKeys(sealing=bytes(range(32)), masking=bytes(range(1, 33)))
    wrong: list[tuple[Any, Any, str]] = [
        (Unmask(self_shares=(), key_shares=()), (), "phase"),
        (MaskedInput(words=8), [bytes(64)], "phase"),
        (Objection(client=1), (), "phase"),
        (AdvertiseKeys(sealing=bytes(32), masking=bytes(32)), (), "schema"),
    ]
    for body, frames, code in wrong:
        [refused] = play.send("anna", body, frames)
        assert (refused.code, play.rounds.updates) == (code, {})
    [refused] = play.send("anna", keys, round=1)
    assert refused.code == "wrong_step"
    play.advertise(*NAMES[1:])
    play.advertise("anna")
    play.share(*NAMES)
    for body, frames, code in (
        (MaskedInput(words=8), [bytes(63)], "tensor"),
        (MaskedInput(words=9), [bytes(64)], "schema"),
        (Objection(client=9), (), "schema"),
        (keys, (), "phase"),
    ):
        [refused] = play.send("anna", body, frames)
        assert refused.code == code
    play.input(*NAMES[:2])
    [refused] = play.send("anna", Objection(client=1))
    assert refused.code == "repeated"
    play.input(*NAMES[2:])
    play.unmask(*NAMES)
    assert play.finish() == pytest.approx(mean_of(NAMES))


def grouped(**settings: Any) -> Play:
    """Under a group's key; the masks that the server can take off are off."""
    play = started(group_key=fingerprint(GROUP), **settings)
    rest(play, "advertise", NAMES)
    play.uncover()
    return play


def test_under_a_groups_key_the_first_by_name_opens_the_sum_for_all() -> None:
    play = grouped()
    assert play.opener == "anna"
    [refused] = play.send("berta", Sealed(round=1), [bytes(box_bytes(7))])
    assert refused.code == "repeated"
    assert play.seal("anna") == pytest.approx(mean_of(NAMES))
    assert play.box() == "anna"
    again = play.of(StartRound)[-1]
    assert (again.round, [ticket.client for ticket in again.answers]) == (1, list(NAMES))


@pytest.mark.parametrize("late", [False, True], ids=["leaves", "is late"])
def test_if_the_opener_is_lost_the_next_one_opens_and_the_round_stands(late: bool) -> None:
    """With a quorum of all, too: nothing is trained again."""
    play = grouped()
    if late:
        play.now = 9.9
        play.carry(play.rounds.tick(play.now))
        assert (play.opener, play.rounds.deadline()) == ("anna", 10)
        play.now = 10
        play.carry(play.rounds.tick(play.now))
        assert play.rounds.deadline() == 20
    else:
        play.leave("anna")
    assert play.opener == "berta"
    [refused] = play.send("anna", Sealed(round=1), [bytes(box_bytes(7))])
    assert refused.code == "wrong_step"
    play.leave("dora")
    assert play.seal("berta") == pytest.approx(mean_of(NAMES))
    assert play.box() == "berta"
    assert play.of(Dismiss) == play.of(SumFailed) == []
    assert len(play.of(StartRound)) == 1  # the next needs all
    play.join("anna", "dora")
    assert play.of(StartRound)[-1].round == 1


def test_whoever_left_while_the_masks_were_taken_off_is_not_asked() -> None:
    play = started(group_key=fingerprint(GROUP))
    rest(play, "advertise", NAMES)
    play.leave("anna")
    play.uncover()
    assert play.opener == "berta"


def test_with_nobody_left_to_open_it_the_round_is_done_again_among_the_same() -> None:
    play = grouped()
    play.leave(*NAMES)
    assert play.ended == []
    play.join(*NAMES)
    assert [start.round for start in play.of(StartRound)] == [0, 0]
    rest(play, "advertise", NAMES)
    play.uncover()
    assert play.seal("anna") == pytest.approx(mean_of(NAMES))


def test_with_nobody_left_a_round_that_does_not_need_all_ends_without_its_sum() -> None:
    play = grouped(quorum=3)
    play.leave(*NAMES)
    assert "all that could open it are gone" in play.fail().message
    assert play.of(SumFailed)[-1].barred == ()
    assert play.rounds.round == 1


def test_what_does_not_open_for_anybody_ends_the_round_without_its_sum() -> None:
    play = grouped()
    for name in NAMES:
        assert play.opener == name
        play.send(name, Unopened())
    assert "does not open under the group's key of anna, berta, clara, dora" in play.fail().message
    start = play.of(StartRound)[-1]
    assert start.round == 1
    assert all(ticket.refused == "the masked sum could not be had" for ticket in start.answers)


def test_a_box_of_another_size_or_round_or_out_of_turn_changes_nothing() -> None:
    early = started(group_key=fingerprint(GROUP))
    [refused] = early.send("anna", Sealed(round=1), [bytes(box_bytes(7))])
    assert refused.code == "phase"
    play = grouped()
    for body, size, code in (
        (Sealed(round=1), box_bytes(7) - 1, "tensor"),
        (Sealed(round=2), box_bytes(7), "schema"),
        (Unmask(self_shares=(), key_shares=()), 0, "phase"),
    ):
        [refused] = play.send("anna", body, [bytes(size)])
        assert refused.code == code
    play.seal("anna")
    assert play.box() == "anna"


def test_an_update_in_the_clear_is_refused_where_updates_are_masked() -> None:
    play = started()
    [refused] = play.rounds.update(play.members["anna"].ticket(), 0, 0.0)
    assert isinstance(refused, Refuse)
    assert refused.code == "masked"


def test_a_masked_step_is_refused_where_updates_are_not() -> None:
    rounds = PlainFedavg(Plan(clients=1, rounds=1, local_steps=1, deadline_s=1))
    ticket = Ticket(b"a", "anna", 1, None)
    rounds.joined(ticket, 0)
    body = AdvertiseKeys(sealing=bytes(32), masking=bytes(32))
    [refused] = rounds.mask(ticket, Mask(request=1, round=0, body=body), (), 0)
    assert isinstance(refused, Refuse)
    assert refused.code == "wrong_step"


@pytest.mark.parametrize(("clients", "quorum", "threshold"), [(3, None, 2), (4, 3, 2), (10, None, 9), (10, 6, 5)])
def test_the_threshold_is_as_high_as_the_quorum_permits(clients: int, quorum: int | None, threshold: int) -> None:
    job = job_of(clients=clients, quorum=quorum)
    people: list[Identity] = [generate_identity(f"c{number:02}") for number in range(clients)]
    sum_ = Sums(job, SHAPES).begin(0, {person.name: person.public for person in people})
    assert (sum_.terms.neighbours, sum_.terms.threshold, sum_.minimum) == (clients - 1, threshold, threshold + 1)


def test_secagg_plus_has_fewer_neighbours_where_there_are_many() -> None:
    job = job_of(clients=100, quorum=90, secure="secagg+")
    people = [generate_identity(f"c{number:03}") for number in range(100)]
    terms = Sums(job, SHAPES).begin(0, {person.name: person.public for person in people}).terms
    assert terms.neighbours < 50 < 2 * terms.threshold + 10
    few = Sums(job, SHAPES).begin(0, {person.name: person.public for person in people[:5]}).terms
    assert (few.neighbours, few.threshold) == (4, 4)


def test_the_vector_is_the_difference_in_the_order_of_names() -> None:
    start = {name: torch.full(shape, 1.0) for name, shape in SHAPES.items()}
    after = {"head.b": torch.tensor([2.0, 3.0, 4.0]), "head.a": torch.tensor([[5.0, 6.0], [7.0, 8.0]])}
    vector = flat_difference(start, after)
    assert vector.tolist() == [4, 5, 6, 7, 1, 2, 3]
    back = flat.part(torch.from_numpy(vector), SHAPES)
    assert all(torch.equal(back[name] + 1, value) for name, value in after.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aggregation": {"type": "median"}, "cohort": {"clients": 3}}, "aggregation.type=median looks at every"),
        ({"aggregation": {"max_update_norm": 2.0}, "cohort": {"clients": 3}}, "aggregation.max_update_norm=2 looks at"),
        ({"aggregation": {"lora": "exact"}, "cohort": {"clients": 3}}, "aggregation.lora=exact looks at every"),
        ({"aggregation": {"secure": "secagg"}, "cohort": {"clients": 2}}, "needs rounds of 3 clients at least"),
        ({"aggregation": {"secure": "secagg+"}, "cohort": {"clients": 5, "quorum": 2}}, "cohort.quorum is 2"),
        ({"cohort": {"clients": 5, "quorum": 2}}, "cohort.quorum is 2: set it to 4 at least"),
        ({"cohort": {"clients": 10, "quorum": 3}}, "set it to 6 at least, or set aggregation.secure=off"),
        ({"cohort": {"clients": 5, "replicas": 2}}, "cohort.replicas=2 leave one 2 of cohort.clients=5"),
        ({"aggregation": {"secure": "secagg"}, "training": {"parts": ["trunk"]}, "cohort": {"clients": 3}}, "nothing"),
    ],
)
def test_what_masking_contradicts_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    values = {"model_name_or_path": "m", "training": {"parts": ["head", "tail"]}} | change
    if "aggregation" in values:
        values["aggregation"] = {"type": "fedavg", **change["aggregation"]}
    with pytest.raises(JobError) as caught:
        parse_job(values, "job.yaml")
    assert said in caught.value.message


def test_a_bare_off_in_yaml_is_the_word(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "model_name_or_path: m\ncohort: {clients: 3}\naggregation: {type: median, secure: off}\n"
        "training: {parts: [head, tail]}\n"
    )
    assert load_job(path).secure == "off"


@pytest.mark.parametrize(
    ("change", "secure"),
    [
        ({"cohort": {"clients": 3}}, "secagg"),
        ({"cohort": {"clients": 2}}, "off"),
        ({"cohort": {"clients": 5, "sampled": 2}}, "off"),
        ({"cohort": {"clients": 3}, "training": {"parts": ["trunk"]}}, "off"),
        ({"cohort": {"clients": 3}, "aggregation": {"type": "fedavg", "secure": "off"}}, "off"),
        ({"cohort": {"clients": 3}, "split": {"trunk": "client"}, "training": {"parts": ["trunk"]}}, "secagg"),
        ({"cohort": {"clients": 6, "replicas": 2}}, "secagg"),
    ],
)
def test_updates_are_masked_wherever_that_hides_something(change: dict[str, Any], secure: str) -> None:
    assert parse_job({"model_name_or_path": "m"} | change, "job.yaml").secure == secure
