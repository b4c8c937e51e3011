"""The ring: two masks a client, whole sums or none, a number used once."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.masked_rounds import Ring, label, off_by, people
from shared.errors import AggregationError, PhaseError, SchemaError, TensorError, TooFewLeft
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.messages import RingKey, RingKeys, RingRound
from shared.secure_aggregation.ring import RingMember, RingServer
from shared.secure_aggregation.terms import RingTerms

LENGTH = 300
IDENTITIES, MEMBERS = people(9)


def terms(clients: int = 5, **changes: Any) -> RingTerms:
    common: dict[str, Any] = {
        "length": LENGTH,
        "clip": 1.0,
        "max_weight": 50,
        "largest_error": 1e-4,
        "label": label("ring"),
    }
    return RingTerms(members=MEMBERS[:clients], **(common | changes))


def update(client: int) -> tuple[Floats, int]:
    random = np.random.default_rng(client)
    return random.normal(0, 0.5, LENGTH).astype(np.float32), int(random.integers(1, 51))


def ring(clients: int = 5, **changes: Any) -> Ring:
    return Ring.of(terms(clients, **changes), IDENTITIES[:clients])


@settings(max_examples=30, deadline=None)
@given(data=st.data(), clients=st.integers(3, 9))
def test_a_sum_among_any_members_is_the_plain_sum(data: st.DataObject, clients: int) -> None:
    made_of = ring(clients)
    for _ in range(2):
        among = data.draw(st.sets(st.integers(0, clients - 1), min_size=3))
        made = made_of.attempt(among, update)
        error, allowed = off_by(terms(clients), made, update)
        assert made.contributors == tuple(sorted(among))
        assert error <= allowed


def test_a_missing_member_costs_the_sum_and_it_is_done_again_without() -> None:
    made_of = ring()
    with pytest.raises(TooFewLeft) as failure:
        made_of.attempt(range(5), update, drop=[3])
    assert failure.value.clients == ("client-00003",)
    assert made_of.server.waiting_for == (3,)
    made = made_of.attempt([0, 1, 2, 4], update)
    error, allowed = off_by(terms(), made, update)
    assert error <= allowed


def test_the_late_input_of_a_dropped_sum_is_not_taken_and_stays_masked() -> None:
    made_of = ring()
    first = made_of.server.start(range(5))
    late, words = made_of.members[3].mask_input(first, *update(3))
    made_of.attempt([0, 1, 2, 4], update)
    with pytest.raises(PhaseError):
        made_of.server.masked_input(3, late, words.data)
    values, weight = update(3)
    plain = terms().encoding.encode(values, weight)
    assert (words != plain).mean() > 0.99


def test_the_same_update_is_masked_anew_each_time() -> None:
    """Masks differ with the number of the sum and with its members; two maskings of zeros say nothing."""
    member = ring().members[0]
    zeros = np.zeros(LENGTH, np.float32)
    asked = [(0, (0, 1, 2, 3, 4)), (1, (0, 1, 2, 3, 4)), (2, (0, 1, 2))]
    seen = [member.mask_input(RingRound(sequence=n, members=m), zeros, 1)[1] for n, m in asked]
    for i, a in enumerate(seen):
        for b in seen[i + 1 :]:
            assert (a == b).mean() < 0.01


def test_the_two_neighbours_of_a_client_and_the_server_can_unmask_it() -> None:
    """What the docstring says is not promised: with three members, the other two know all."""
    made_of = ring(3)
    asked = made_of.server.start(range(3))
    seen = {n: m.mask_input(asked, *update(n))[1] for n, m in made_of.members.items()}
    total = seen[0] + seen[1] + seen[2]
    for colluder in (1, 2):
        total = total - terms(3).encoding.encode(*update(colluder))
    assert (total == terms(3).encoding.encode(*update(0))).all()


def test_a_number_is_used_once_and_other_members_are_refused() -> None:
    member = ring().members[0]
    member.mask_input(RingRound(sequence=4, members=(0, 1, 2)), *update(0))
    for sequence in (4, 3):
        with pytest.raises(PhaseError):
            member.mask_input(RingRound(sequence=sequence, members=(0, 1, 2)), *update(0))
    for members in ((1, 2, 3), (0, 1, 7), (0, 2, 1), (0, 1, 1)):
        with pytest.raises(SchemaError):
            member.mask_input(RingRound(sequence=5, members=members), *update(0))
    with pytest.raises(TooFewLeft):
        member.mask_input(RingRound(sequence=5, members=(0, 1)), *update(0))
    with pytest.raises(TensorError):
        member.mask_input(RingRound(sequence=5, members=(0, 1, 2)), np.zeros(3, np.float32), 1)
    member.mask_input(RingRound(sequence=5, members=(0, 1, 2)), *update(0))


def test_a_swapped_key_spoils_the_sum_and_shows_nothing() -> None:
    stranger = RingMember(terms(), IDENTITIES[0]).advertise_key().key
    server, members = RingServer(terms()), [RingMember(terms(), identity) for identity in IDENTITIES[:5]]
    for member in members:
        server.advertise_key(member.number, member.advertise_key())
    true = server.close_advertising()
    for member in members:
        swapped = tuple(
            entry.model_copy(update={"key": stranger}) if entry.client == (member.number + 1) % 5 else entry
            for entry in true.keys
        )
        member.connect(RingKeys(keys=swapped))
    asked = server.start(range(5))
    for member in members:
        message, words = member.mask_input(asked, *update(member.number))
        server.masked_input(member.number, message, words.data)
    with pytest.raises(AggregationError, match="masks did not cancel"):
        server.finish().mean(terms())


def test_out_of_turn() -> None:
    server, member = RingServer(terms()), RingMember(terms(), IDENTITIES[0])
    with pytest.raises(PhaseError):
        member.mask_input(RingRound(sequence=0, members=(0, 1, 2)), *update(0))
    with pytest.raises(TooFewLeft):
        server.close_advertising()
    with pytest.raises(PhaseError):
        server.start([0, 1, 2])
    with pytest.raises(PhaseError):
        server.finish()
    with pytest.raises(SchemaError, match="low order"):
        server.advertise_key(0, RingKey(key=bytes(32)))
    server.advertise_key(0, member.advertise_key())
    for client in (0, 5):
        with pytest.raises(PhaseError):
            server.advertise_key(client, member.advertise_key())
    done = ring()
    everybody = RingKeys(keys=())
    with pytest.raises(PhaseError):
        done.members[0].connect(everybody)
    with pytest.raises(SchemaError):
        RingMember(terms(), IDENTITIES[0]).connect(everybody)
    with pytest.raises(TooFewLeft):
        done.server.start([0, 1])
    asked = done.server.start([0, 1, 2])
    message, words = done.members[0].mask_input(asked, *update(0))
    with pytest.raises(PhaseError):
        done.server.masked_input(3, message, words.data)
    with pytest.raises(TensorError):
        done.server.masked_input(0, message, words[1:].data)
    done.server.masked_input(0, message, words.data)
    with pytest.raises(PhaseError):
        done.server.masked_input(0, message, words.data)


def test_a_minimum_below_three_or_past_the_members_is_refused() -> None:
    for minimum in (2, 6):
        with pytest.raises(ValidationError, match="minimum"):
            terms(minimum=minimum)
