"""Lying clients are named; a server that changes, swaps or repeats what it relays is found out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.masked_rounds import Round, label, off_by, people
from shared.errors import PhaseError, SchemaError, ShareError, TooFewLeft
from shared.secure_aggregation import keys, shamir
from shared.secure_aggregation.client import Client, View
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.messages import (
    AdvertiseKeys,
    KeyList,
    RelayedShares,
    SealedShares,
    Share,
    ShareKeys,
    Unmask,
)
from shared.secure_aggregation.terms import Terms

IDENTITIES, MEMBERS = people(6)
FRESH = X25519PrivateKey.generate().public_key().public_bytes_raw()


def agreed(**changes: Any) -> Terms:
    common: dict[str, Any] = {
        "length": 100,
        "clip": 1.0,
        "max_weight": 9,
        "largest_error": 1e-4,
        "label": label("lies"),
    }
    return Terms(members=MEMBERS, neighbours=5, threshold=3, **(common | changes))


def update(client: int) -> tuple[Floats, int]:
    return np.linspace(-1, 1, 100, dtype=np.float32) / np.float32(client + 1), client + 1


def until_unmasking(drop: tuple[int, ...] = ()) -> Round:
    played = Round.of(agreed(), IDENTITIES)
    played.advertise()
    played.share()
    played.mask(update, drop=drop)
    return played


def lying(answer: Unmask, change: Callable[[Share], Share]) -> Unmask:
    return Unmask(self_shares=tuple(map(change, answer.self_shares)), key_shares=tuple(map(change, answer.key_shares)))


def flipped(share: Share) -> Share:
    return Share(client=share.client, share=share.share[:-1] + bytes([share.share[-1] ^ 1]))


@pytest.mark.parametrize("drop", [(), (5,)])
def test_holders_whose_shares_lie_are_named_and_left_out(drop: tuple[int, ...]) -> None:
    played = until_unmasking(drop=drop)
    for number, request in played.server.close_inputs().items():
        answer = played.clients[number].unmask(request)
        played.server.unmask(number, lying(answer, flipped) if number == 2 else answer)
    made = played.server.finish()
    assert made.liars == ("client-00002",)
    error, allowed = off_by(agreed(), made, update)
    assert set(made.contributors) == set(range(6)) - set(drop)
    assert error <= allowed


def test_too_many_lying_holders_lose_the_sum_and_are_named() -> None:
    played = until_unmasking()
    for number, request in played.server.close_inputs().items():
        answer = played.clients[number].unmask(request)
        played.server.unmask(number, lying(answer, flipped) if number in (0, 2, 4) else answer)
    with pytest.raises(TooFewLeft) as failure:
        played.server.finish()
    assert failure.value.clients == ("client-00000", "client-00002", "client-00004")


def test_one_share_given_for_another_is_a_lie() -> None:
    played = until_unmasking()
    requests = played.server.close_inputs()
    answer = played.clients[1].unmask(requests[1])
    with pytest.raises(SchemaError):
        played.server.unmask(1, Unmask(self_shares=answer.self_shares[1:], key_shares=()))
    with pytest.raises(SchemaError):
        played.server.unmask(1, Unmask(self_shares=(answer.self_shares[0],) * 5, key_shares=()))
    rotated = [share.share for share in (*answer.self_shares[1:], answer.self_shares[0])]
    moved = [Share(client=s.client, share=r) for s, r in zip(answer.self_shares, rotated, strict=True)]
    played.server.unmask(1, Unmask(self_shares=tuple(moved), key_shares=()))
    for number in {0, 2, 3, 4, 5}:
        played.server.unmask(number, played.clients[number].unmask(requests[number]))
    assert played.server.finish().liars == ("client-00001",)


class WrongDealer(Client):
    """Deals shares of other secrets than its own, and commits to them."""

    def _sealed(self, view: View, holder: int, self_share: bytes, key_share: bytes) -> SealedShares:
        wrong = shamir.split(bytes(32), 2, [holder + 1], lambda size: bytes([holder]) * size)[holder + 1]
        return super()._sealed(view, holder, wrong, wrong)


class OtherCommitments(Client):
    """Seals shares that are not those it commits to."""

    def _sealed(self, view: View, holder: int, self_share: bytes, key_share: bytes) -> SealedShares:
        entry = super()._sealed(view, holder, self_share, key_share)
        promised = entry.self_commitment + entry.key_commitment
        box = keys.seal(self._box_key(view, self.number, holder), key_share + self_share, promised)
        return entry.model_copy(update={"box": box})


@pytest.mark.parametrize("drops_out", [False, True])
def test_who_dealt_wrong_shares_is_named(drops_out: bool) -> None:
    played = Round.of(agreed(), IDENTITIES)
    played.clients = {**played.clients, 3: WrongDealer(agreed(), IDENTITIES[3])}
    played.advertise()
    played.share()
    played.mask(update, drop=[3] if drops_out else [])
    with pytest.raises(ShareError) as failure:
        played.unmask()
    assert failure.value.clients == ("client-00003",)


def test_who_does_not_keep_to_its_commitments_is_named_before_anything_is_sent() -> None:
    played = Round.of(agreed(), IDENTITIES)
    played.clients = {**played.clients, 3: OtherCommitments(agreed(), IDENTITIES[3])}
    played.advertise()
    played.share()
    with pytest.raises(ShareError, match="committed to") as failure:
        played.mask(update)
    assert failure.value.clients == ("client-00003",)


def shared() -> tuple[Round, dict[int, RelayedShares]]:
    played = Round.of(agreed(), IDENTITIES)
    played.advertise()
    played.share()
    return played, played.server.close_sharing()


Change = Callable[[tuple[SealedShares, ...]], tuple[SealedShares, ...]]
BOX_CHANGES: dict[str, Change] = {
    "a bit of a box": lambda s: (s[0].model_copy(update={"box": bytes([s[0].box[0] ^ 1]) + s[0].box[1:]}), *s[1:]),
    "a commitment": lambda s: (s[0].model_copy(update={"key_commitment": bytes(32)}), *s[1:]),
    "two boxes exchanged": lambda s: (
        s[0].model_copy(update={"box": s[1].box}),
        s[1].model_copy(update={"box": s[0].box}),
        *s[2:],
    ),
}


@pytest.mark.parametrize("change", BOX_CHANGES.values(), ids=BOX_CHANGES)
def test_changed_boxes_do_not_open_and_the_right_ones_still_do(change: Change) -> None:
    played, relayed = shared()
    with pytest.raises(ShareError, match="client-00001"):
        played.clients[0].mask_input(RelayedShares(shares=change(relayed[0].shares)), *update(0))
    played.clients[0].mask_input(relayed[0], *update(0))


def test_boxes_for_others_or_of_nobody_are_refused() -> None:
    played, relayed = shared()
    mine = relayed[0].shares
    with pytest.raises(ShareError):
        played.clients[0].mask_input(RelayedShares(shares=(mine[0], *relayed[2].shares[2:])), *update(0))
    for wrong in ((*mine[1:], mine[0]), (mine[0], *mine), (mine[0].model_copy(update={"client": 0}), *mine[1:])):
        with pytest.raises(SchemaError):
            played.clients[0].mask_input(RelayedShares(shares=wrong), *update(0))
    with pytest.raises(TooFewLeft):
        played.clients[0].mask_input(RelayedShares(shares=mine[:2]), *update(0))


def test_boxes_of_an_earlier_round_do_not_open() -> None:
    _, earlier = shared()
    played, _ = shared()
    with pytest.raises(ShareError):
        played.clients[0].mask_input(earlier[0], *update(0))


def test_a_box_does_not_open_at_its_sender() -> None:
    played, _ = shared()
    view = played.clients[0]._view
    sent = played.clients[0]._sealed(view, 1, bytes(33), bytes(33))
    with pytest.raises(ShareError):
        played.clients[0]._open(sent)


@pytest.mark.parametrize("key", ["sealing", "masking"])
def test_a_server_that_swaps_a_key_is_found_out(key: str) -> None:
    """Client 1 is told another key of client 0 than the others: nothing between the two views opens."""
    played = Round.of(agreed(), IDENTITIES)
    played.advertise()
    key_list = played.server.close_advertising()
    swapped = KeyList(keys=(key_list.keys[0].model_copy(update={key: FRESH}), *key_list.keys[1:]))
    answers = {n: c.share_keys(swapped if n == 1 else key_list) for n, c in played.clients.items()}
    for number, answer in answers.items():
        played.server.share_keys(number, answer)
    relayed = played.server.close_sharing()
    with pytest.raises(ShareError):
        played.clients[1].mask_input(relayed[1], *update(1))
    with pytest.raises(ShareError, match="client-00001"):
        played.clients[2].mask_input(relayed[2], *update(2))


def test_a_server_in_the_middle_with_keys_of_its_own_seals_nothing() -> None:
    """It answers for client 1 towards all others with fresh keys, but has not client 1's static key."""
    stranger = people(1)[0][0]
    members = agreed().members
    with pytest.raises(SchemaError):
        Client(agreed(), stranger)
    played = Round.of(agreed(), IDENTITIES)
    forger = Client(agreed(), IDENTITIES[1])
    forger._static = stranger.private
    played.clients = {**played.clients, 1: forger}
    played.advertise()
    played.share()
    relayed = played.server.close_sharing()
    for number in (0, 2, 3, 4, 5):
        with pytest.raises(ShareError) as failure:
            played.clients[number].mask_input(relayed[number], *update(number))
        assert failure.value.clients == (members[1].name,)


def test_lists_of_keys_that_leave_a_client_out_or_are_out_of_order_are_refused() -> None:
    played = Round.of(agreed(), IDENTITIES)
    played.advertise()
    entries = played.server.close_advertising().keys
    client = played.clients[0]
    for wrong in (
        entries[1:],
        tuple(reversed(entries)),
        (entries[0], *entries),
        (entries[0].model_copy(update={"masking": FRESH}), *entries[1:]),
        (*entries, entries[0].model_copy(update={"client": 6})),
    ):
        with pytest.raises(SchemaError):
            client.share_keys(KeyList(keys=wrong))
    with pytest.raises(TooFewLeft):
        client.share_keys(KeyList(keys=entries[:3]))
    client.share_keys(KeyList(keys=entries))


def test_keys_of_low_order_are_refused_by_both_sides() -> None:
    played = Round.of(agreed(), IDENTITIES)
    for message in (AdvertiseKeys(sealing=bytes(32), masking=FRESH), AdvertiseKeys(sealing=FRESH, masking=bytes(32))):
        with pytest.raises(SchemaError, match="low order"):
            played.server.advertise_keys(0, message)
    played.advertise()
    entries = played.server.close_advertising().keys
    weak = entries[1].model_copy(update={"sealing": bytes(32)})
    with pytest.raises(SchemaError, match="low order"):
        played.clients[0].share_keys(KeyList(keys=(entries[0], weak, *entries[2:])))


def test_other_terms_do_not_mix() -> None:
    """A client with another label, or another bound, opens nothing of the others'."""
    for other in (agreed(label=label("other")), agreed(clip=2.0)):
        played = Round.of(agreed(), IDENTITIES)
        played.clients = {**played.clients, 1: Client(other, IDENTITIES[1])}
        played.advertise()
        played.share()
        with pytest.raises(ShareError, match="client-00001"):
            played.mask(update)


def test_shares_for_other_than_neighbours_are_refused_by_the_server() -> None:
    played = Round.of(agreed(), IDENTITIES)
    played.advertise()
    key_list = played.server.close_advertising()
    answer = played.clients[0].share_keys(key_list)
    for wrong in (
        answer.shares[1:],
        (answer.shares[0], *answer.shares),
        (answer.shares[0].model_copy(update={"client": 0}), *answer.shares[1:]),
    ):
        with pytest.raises(SchemaError):
            played.server.share_keys(0, ShareKeys(seed_commitment=bytes(32), shares=wrong))
    with pytest.raises(PhaseError):
        played.server.share_keys(7, answer)
    played.server.share_keys(0, answer)
