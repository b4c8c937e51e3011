"""Under a group's key clients get the sum and the server does not, not even its lowest bits."""

import numpy as np
import pytest

from benchmarks.masked_rounds import SERVER, Meter, Ring, label, people, play_group, play_round
from shared.errors import AggregationError, PhaseError, SchemaError, ShareError
from shared.secure_aggregation.client import Client
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.group_key import GroupKey, GroupMember
from shared.secure_aggregation.masks import Mask, add_masks
from shared.secure_aggregation.messages import GroupHellos, GroupSum, PublicKey, RingRound
from shared.secure_aggregation.terms import RingTerms, Terms

LENGTH = 2**14
IDENTITIES, MEMBERS = people(8)
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
    groups = play_group(TERMS, IDENTITIES, Meter())
    assert len({group.seed for group in groups}) == 1
    played, made = play_round(TERMS, IDENTITIES, update, {"mask": dropped}, groups=groups)
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
    groups = play_group(RING, IDENTITIES, Meter())
    ring = Ring.of(RING, IDENTITIES, groups=groups)
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
    groups = play_group(TERMS, IDENTITIES, Meter())
    played, made = play_round(TERMS, IDENTITIES, update, {}, groups=groups)
    with pytest.raises(AggregationError):
        played.clients[0].open_sum(GroupSum(contributors=7, words=LENGTH + 1), made.words.copy())
    for wrong in (GroupSum(contributors=9, words=LENGTH + 1), GroupSum(contributors=8, words=LENGTH)):
        with pytest.raises(SchemaError):
            played.clients[0].open_sum(wrong, made.words.copy())


def hellos(members: list[GroupMember]) -> GroupHellos:
    return GroupHellos(keys=tuple(PublicKey(client=m.number, key=m.hello().key) for m in members))


def test_a_seed_opens_for_its_receiver_alone_and_from_its_dealer() -> None:
    members = [GroupMember(TERMS, identity) for identity in IDENTITIES]
    everybody = hellos(members)
    group, seeds = members[2].deal(everybody)
    box = {entry.client: entry.model_copy(update={"client": 2}) for entry in seeds.seeds}
    assert members[5].join(everybody, box[5]) == group
    assert group.seed not in b"".join(entry.box for entry in seeds.seeds)
    assert group.seed.hex() not in repr(group)
    for sealed in (box[4], box[5].model_copy(update={"client": 3})):
        with pytest.raises(ShareError):
            members[5].join(everybody, sealed)
    with pytest.raises(SchemaError):
        members[5].join(everybody, box[5].model_copy(update={"client": 5}))
    with pytest.raises(PhaseError):
        members[2].deal(everybody)


def test_a_server_that_swaps_a_key_or_leaves_one_out_is_found_out() -> None:
    members = [GroupMember(TERMS, identity) for identity in IDENTITIES]
    everybody = hellos(members)
    other = GroupMember(TERMS, IDENTITIES[5]).hello().key
    swapped = GroupHellos(
        keys=tuple(e.model_copy(update={"key": other}) if e.client == 5 else e for e in everybody.keys)
    )
    _, seeds = members[0].deal(swapped)
    for entry in seeds.seeds:
        with pytest.raises((ShareError, SchemaError)):
            members[entry.client].join(everybody, entry.model_copy(update={"client": 0}))
        if entry.client == 5:
            with pytest.raises(SchemaError):
                members[5].join(swapped, entry.model_copy(update={"client": 0}))


def test_the_group_and_the_terms_go_together() -> None:
    with pytest.raises(SchemaError, match="group_key"):
        Client(TERMS, IDENTITIES[0])
    plain = Terms.model_validate(TERMS.model_dump() | {"group_key": False})
    with pytest.raises(SchemaError, match="group_key"):
        Client(plain, IDENTITIES[0], group=GroupKey(bytes(32)))
    played, made = play_round(plain, IDENTITIES, update, {})
    with pytest.raises(PhaseError):
        played.clients[0].open_sum(GroupSum(contributors=8, words=LENGTH + 1), made.words)


def test_every_client_pays_the_same_for_a_group_of_any_size() -> None:
    """One box of 48 bytes and the keys of all: no vector per member."""
    meter = Meter()
    play_group(TERMS, IDENTITIES, meter)
    assert SERVER not in meter.received
    assert max(meter.received.values()) < 8 * 60 + 200
