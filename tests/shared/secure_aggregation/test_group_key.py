"""Under a group's key clients get the sum and the server does not, not even its lowest bits."""

import numpy as np
import pytest

from benchmarks.masked_rounds import Ring, label, people, play_round
from shared.errors import AggregationError, PhaseError, SchemaError
from shared.secure_aggregation.client import Client
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.masks import Mask, add_masks
from shared.secure_aggregation.messages import GroupSum, RingRound
from shared.secure_aggregation.terms import RingTerms, Terms

LENGTH = 2**14
IDENTITIES, MEMBERS = people(8)
GROUP = GroupKey(bytes(range(32)))
TERMS = Terms(
    label=label("group"),
    members=MEMBERS,
    length=LENGTH,
    clip=1.0,
    max_weight=10,
    largest_error=1e-3,
    neighbours=7,
    threshold=5,
    group_key=True,
)
RING = RingTerms(
    label=label("group"), members=MEMBERS, length=LENGTH, clip=1.0, max_weight=10, largest_error=1e-3, group_key=True
)


def update(client: int) -> tuple[Floats, int]:
    random = np.random.default_rng(client)
    return random.normal(0, 0.3, LENGTH).astype(np.float32), client + 1


def plain_mean(contributors: tuple[int, ...]) -> np.ndarray:
    updates = [update(client) for client in contributors]
    values = np.stack([np.clip(values.astype(np.float64), -1, 1) for values, _ in updates])
    return np.average(values, axis=0, weights=[weight for _, weight in updates])


@pytest.mark.parametrize("dropped", [(), (3,), (3, 6)])
def test_all_members_open_the_same_sum_and_the_server_does_not(dropped: tuple[int, ...]) -> None:
    played, made = play_round(TERMS, IDENTITIES, update, {"mask": dropped}, group=GROUP)
    with pytest.raises(PhaseError, match="clients' alone"):
        made.mean(TERMS)
    with pytest.raises(AggregationError):
        TERMS.encoding.mean(made.words, len(made.contributors))
    there = [n for n in range(8) if n not in dropped]
    for number in there:
        mean, weight = played.clients[number].open_sum(made.for_group(), made.words.copy())
        assert weight == sum(n + 1 for n in there)
        allowed = TERMS.encoding.largest_error(len(there), weight)
        assert np.abs(mean - plain_mean(made.contributors)).max() <= allowed


def test_in_a_ring_too() -> None:
    ring = Ring.of(RING, IDENTITIES, group=GROUP)
    made = ring.attempt([0, 1, 2, 5], update)
    asked = RingRound(sequence=0, members=(0, 1, 2, 5))
    mean, weight = ring.members[1].open_sum(asked, made.for_group(), made.words.copy())
    assert np.abs(mean - plain_mean((0, 1, 2, 5))).max() <= RING.encoding.largest_error(4, weight)
    with pytest.raises(AggregationError):
        ring.members[1].open_sum(RingRound(sequence=1, members=asked.members), made.for_group(), made.words.copy())


@pytest.mark.parametrize("contributors", [4, 5, 8])
def test_the_servers_sum_is_uniform_where_it_is_not_zero(contributors: int) -> None:
    """m G has no low bits if m is even: the data must not be in them. Chi-square over the bits above, by byte."""
    words = [TERMS.encoding.encode(*update(client)) for client in range(contributors)]
    total = np.sum(words, axis=0, dtype=TERMS.encoding.dtype)
    plain = total.copy()
    add_masks(total, [Mask(GroupKey(bytes(32)).mask(bytes(32)).key, contributors)])
    low = (contributors & -contributors).bit_length() - 1
    assert (total % 2**low == 0).all()
    assert (plain % 2**TERMS.encoding.shift == 0).all()
    assert 2**TERMS.encoding.shift >= contributors
    for shift in (low, low + 4, 24):
        counts = np.bincount((total >> np.uint32(shift)).astype(np.uint8), minlength=256)
        expected = len(total) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * 22.6


def test_without_the_shift_the_sums_parity_would_show() -> None:
    """Why the shift is there."""
    data = np.arange(1000, dtype="<u4")
    masked = data.copy()
    add_masks(masked, [Mask(bytes(32), 4)])
    assert (masked % 4 == data % 4).all()


def test_a_wrong_number_of_contributors_opens_nothing() -> None:
    played, made = play_round(TERMS, IDENTITIES, update, {}, group=GROUP)
    with pytest.raises(AggregationError):
        played.clients[0].open_sum(GroupSum(contributors=7, words=LENGTH + 1), made.words.copy())
    for wrong in (GroupSum(contributors=9, words=LENGTH + 1), GroupSum(contributors=8, words=LENGTH)):
        with pytest.raises(SchemaError):
            played.clients[0].open_sum(wrong, made.words.copy())


def test_what_is_printed_of_a_key_is_not_its_seed() -> None:
    assert GROUP.seed.hex() not in repr(GROUP)
    assert repr(GROUP.seed) not in repr(GROUP)


def test_the_group_and_the_terms_go_together() -> None:
    with pytest.raises(SchemaError, match="group_key"):
        Client(TERMS, IDENTITIES[0])
    plain = Terms.model_validate(TERMS.model_dump() | {"group_key": False})
    with pytest.raises(SchemaError, match="group_key"):
        Client(plain, IDENTITIES[0], group=GroupKey(bytes(32)))
    played, made = play_round(plain, IDENTITIES, update, {})
    with pytest.raises(PhaseError):
        played.clients[0].open_sum(GroupSum(contributors=8, words=LENGTH + 1), made.words)
