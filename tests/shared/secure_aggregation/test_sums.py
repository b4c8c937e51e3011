"""Sums by SecAgg and SecAgg+ equal plain sums, whoever drops out and when, up to the threshold; past it they fail."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.masked_rounds import Round, label, off_by, people, play_round
from shared.errors import PhaseError, SchemaError, TensorError, TooFewLeft
from shared.secure_aggregation import graph
from shared.secure_aggregation.client import Client, keys_digest
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.messages import UnmaskRequest
from shared.secure_aggregation.server import MaskedSum, Server
from shared.secure_aggregation.terms import Terms

LENGTH = 257
IDENTITIES, MEMBERS = people(40)


def terms(clients: int = 6, neighbours: int = 5, threshold: int = 3, **changes: Any) -> Terms:
    common: dict[str, Any] = {
        "length": LENGTH,
        "clip": 1.0,
        "max_weight": 100,
        "largest_error": 1e-4,
        "label": label("test"),
    }
    return Terms(members=MEMBERS[:clients], neighbours=neighbours, threshold=threshold, **(common | changes))


def update(client: int) -> tuple[Floats, int]:
    """Values past the bound too; weights from 1 to 100."""
    random = np.random.default_rng(client)
    return random.normal(0, 0.5, LENGTH).astype(np.float32), int(random.integers(1, 101))


def check(agreed: Terms, made: MaskedSum, contributors: set[int]) -> None:
    """Against the plain weighted mean in float64, to the derived bound."""
    assert set(made.contributors) == contributors
    error, allowed = off_by(agreed, made, update)
    assert error <= allowed


@pytest.mark.parametrize(("clients", "neighbours", "threshold"), [(3, 2, 2), (6, 5, 3), (12, 11, 8), (12, 6, 4)])
@pytest.mark.parametrize("largest_error", [1e-4, 1e-12])
def test_a_sum_is_the_plain_sum(clients: int, neighbours: int, threshold: int, largest_error: float) -> None:
    agreed = terms(clients, neighbours, threshold, largest_error=largest_error)
    played, made = play_round(agreed, IDENTITIES[:clients], update, {})
    check(agreed, made, set(range(clients)))
    assert made.liars == ()
    assert played.server.waiting_for == ()


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "unmask"])
@pytest.mark.parametrize(("neighbours", "threshold"), [(11, 7), (8, 5)])
def test_drop_outs_at_each_phase(phase: str, neighbours: int, threshold: int) -> None:
    agreed = terms(12, neighbours, threshold)
    gone = {2, 7, 11}
    _, made = play_round(agreed, IDENTITIES[:12], update, {phase: gone})
    check(agreed, made, set(range(12)) if phase == "unmask" else set(range(12)) - gone)


def test_drop_outs_at_all_phases() -> None:
    agreed = terms(12, 11, 6)
    drops = {"advertise": [0], "share": [5], "mask": [3, 9], "unmask": [4]}
    _, made = play_round(agreed, IDENTITIES[:12], update, drops)
    check(agreed, made, set(range(12)) - {0, 5, 3, 9})


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "unmask"])
def test_past_the_threshold_a_round_fails(phase: str) -> None:
    """7 clients, 5 of 6 neighbours are due: one may drop out, two may not."""
    agreed = terms(7, 6, 5)
    _, made = play_round(agreed, IDENTITIES[:7], update, {phase: [1]})
    assert len(made.contributors) == (7 if phase == "unmask" else 6)
    with pytest.raises(TooFewLeft) as failure:
        play_round(agreed, IDENTITIES[:7], update, {phase: [1, 4]})
    assert failure.value.clients == ("client-00001", "client-00004")
    assert "threshold" in failure.value.message


def test_a_phase_that_fails_can_be_waited_for() -> None:
    agreed = terms(7, 6, 5)
    played = Round.of(agreed, IDENTITIES[:7])
    played.advertise(drop=[1, 4])
    with pytest.raises(TooFewLeft):
        played.server.close_advertising()
    assert played.server.waiting_for == (1, 4)
    played.server.advertise_keys(4, played.clients[4].advertise_keys())
    played.gone = {1}
    played.share()
    played.mask(update)
    check(agreed, played.unmask(), set(range(7)) - {1})


def test_who_has_too_few_neighbours_left_is_left_out_and_the_others_go_on() -> None:
    """On a circle of 40, 12 neighbours each: one loses six of them, all others five at most, and seven are due."""
    agreed = terms(40, 12, 7)
    played = Round.of(agreed, IDENTITIES)
    played.advertise()
    key_list = played.server.close_advertising()
    answers = {number: client.share_keys(key_list) for number, client in played.clients.items()}
    order = graph.shuffled(keys_digest(agreed, key_list), range(40))
    gone = {order[20 + step] for step in (-6, -5, -1, 1, 5, 6)}
    for number in set(range(40)) - gone:
        played.server.share_keys(number, answers[number])
    relayed = played.server.close_sharing()
    assert set(range(40)) - relayed.keys() == gone | {order[20]}
    for number, message in relayed.items():
        words = played.clients[number].mask_input(message, *update(number))
        played.server.masked_input(number, words[0], words[1].data)
    check(agreed, played.unmask(gone), set(relayed))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_pattern_of_drop_outs_gives_the_sum_or_fails_cleanly(data: st.DataObject) -> None:
    clients = data.draw(st.integers(3, 9))
    neighbours = data.draw(st.sampled_from([*range(2, clients - 1, 2), clients - 1]))
    threshold = data.draw(st.integers(max(2, neighbours // 2 + 1), neighbours))
    agreed = terms(clients, neighbours, threshold)
    phases = st.sampled_from(["advertise", "share", "mask", "unmask", None, None, None, None])
    fate = {client: data.draw(phases) for client in range(clients)}
    drops = {phase: [client for client in fate if fate[client] == phase] for phase in set(fate.values()) if phase}
    try:
        _, made = play_round(agreed, IDENTITIES[:clients], update, drops)
    except TooFewLeft:
        # Never with as many there as the threshold asks of every neighbourhood.
        assert sum(1 for phase in fate.values() if phase) > neighbours - threshold
        return
    assert {client for client in fate if fate[client] is None} & set(made.contributors)
    assert not set(made.contributors) & {c for c in fate if fate[c] in ("advertise", "share", "mask")}
    check(agreed, made, set(made.contributors))


def masked(agreed: Terms, values: Floats) -> np.ndarray:
    """What the server gets of client 0."""
    seen: list[np.ndarray] = []
    played = Round.of(agreed, IDENTITIES[: len(agreed.members)])
    played.advertise()
    played.share()
    relayed = played.server.close_sharing()
    seen.append(played.clients[0].mask_input(relayed[0], values, 1)[1])
    return seen[0]


def test_a_masked_update_looks_uniform() -> None:
    """Chi-square over its bytes (255 degrees of freedom: mean 255, deviation 22.6), for an update of zeros."""
    length = 2**18
    words = masked(terms(length=length), np.zeros(length, np.float32))
    counts = np.bincount(np.frombuffer(words.tobytes(), np.uint8), minlength=256)
    expected = words.nbytes / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * 22.6
    plain = terms(length=length).encoding.encode(np.zeros(length, np.float32), 1)
    counts = np.bincount(np.frombuffer(plain.tobytes(), np.uint8), minlength=256)
    assert ((counts - expected) ** 2 / expected).sum() > 10**6


def test_the_same_update_in_two_rounds_is_uncorrelated() -> None:
    length = 2**16
    values = np.linspace(-1, 1, length, dtype=np.float32)
    first, second = (masked(terms(length=length), values)[:-1] for _ in range(2))
    signed = [words.astype(np.int32).astype(float) for words in (first, second)]
    for a, b in (signed, [signed[0], values.astype(float)]):
        assert abs(np.corrcoef(a, b)[0, 1]) < 6 / length**0.5
    assert (first == second).mean() < 1e-3


def test_memory_beside_the_words_is_bounded() -> None:
    length = 3_000_000
    agreed = terms(12, 11, 8, length=length)
    played = Round.of(agreed, IDENTITIES[:12])
    played.advertise()
    played.share()
    relayed = played.server.close_sharing()
    values = np.zeros(length, np.float32)
    tracemalloc.start()
    message, words = played.clients[0].mask_input(relayed[0], values, 1)
    at_client = tracemalloc.get_traced_memory()[1] - words.nbytes
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    played.server.masked_input(0, message, words.data)
    at_server = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert at_client < 4 * 2**20
    assert at_server < 2**20


def test_a_client_gives_no_second_kind_of_share() -> None:
    played = Round.of(terms(), IDENTITIES[:6])
    played.advertise()
    played.share()
    played.mask(update, drop=[5])
    asked = played.server.close_inputs()[0]
    assert (asked.summed, asked.dropped) == ((0, 1, 2, 3, 4), (5,))
    client = played.clients[0]
    for lie in (
        UnmaskRequest(summed=(0, 1, 2, 3, 4), dropped=(4, 5)),
        UnmaskRequest(summed=(0, 1, 2, 3, 4, 5), dropped=(5,)),
        UnmaskRequest(summed=(0, 1, 2, 3), dropped=(5,)),
        UnmaskRequest(summed=(1, 2, 3, 4), dropped=(5,)),
        UnmaskRequest(summed=(0, 1, 1, 2, 3, 4), dropped=(5,)),
        UnmaskRequest(summed=(4, 3, 2, 1, 0), dropped=(5,)),
    ):
        with pytest.raises(SchemaError):
            client.unmask(lie)
    with pytest.raises(TooFewLeft):
        client.unmask(UnmaskRequest(summed=(0, 1, 2), dropped=(3, 4, 5)))
    client.unmask(asked)
    for again in (asked, UnmaskRequest(summed=(0, 1, 2, 3), dropped=(4, 5))):
        with pytest.raises(PhaseError):
            client.unmask(again)


def test_all_know_the_same_sum_whoever_their_neighbours_are() -> None:
    """So that a sum that is made again among the same, with other neighbours for all, is no other sum to anybody."""
    agreed = terms(40, 12, 7)
    gone = {"advertise": {3}, "share": {8}, "mask": {21, 30}}
    played = Round.of(agreed, IDENTITIES)
    played.advertise(drop=gone["advertise"])
    played.share(drop=gone["share"])
    played.mask(update, drop=gone["mask"])
    requests = played.server.close_inputs()
    left = tuple(sorted(set(range(40)) - {3, 8, 21, 30}))
    assert {played.clients[number].in_sum(request) for number, request in requests.items()} == {left}
    client, request = played.clients[0], requests[0]
    stranger, strangers = next((n, r) for n, r in requests.items() if 8 in keys_of(played.clients[n]) and n != 0)
    for number, lie in (
        (0, request.model_copy(update={"summed": tuple(n for n in left if n)})),
        (0, request.model_copy(update={"summed": tuple(sorted({*left, 3}))})),
        (stranger, strangers.model_copy(update={"summed": tuple(sorted({*left, 8}))})),
    ):
        with pytest.raises(SchemaError):
            played.clients[number].in_sum(lie)
    assert client.unmask(request)


def keys_of(client: Client) -> list[int]:
    """Its neighbours."""
    return client._view.neighbours


def test_both_kinds_cannot_be_had_by_telling_clients_different_stories() -> None:
    """Of client 5's two secrets a lying server gets shares from 5 neighbours in all, but 3 are due for each."""
    agreed = terms()
    played = Round.of(agreed, IDENTITIES[:6])
    played.advertise()
    played.share()
    played.mask(update)
    story = {True: UnmaskRequest(summed=(), dropped=()), False: UnmaskRequest(summed=(), dropped=())}
    kinds = []
    for number in range(5):
        story[True] = UnmaskRequest(summed=(0, 1, 2, 3, 4, 5), dropped=())
        story[False] = UnmaskRequest(summed=(0, 1, 2, 3, 4), dropped=(5,))
        answer = played.clients[number].unmask(story[number % 2 == 0])
        kinds.append(5 in {share.client for share in answer.self_shares})
    assert sorted([kinds.count(True), kinds.count(False)])[0] < agreed.threshold


def test_methods_out_of_turn_change_nothing() -> None:
    agreed = terms()
    played = Round.of(agreed, IDENTITIES[:6])
    early = Client(agreed, IDENTITIES[0])
    server = Server(agreed)
    with pytest.raises(PhaseError):
        server.close_sharing()
    with pytest.raises(PhaseError):
        server.finish()
    played.advertise()
    with pytest.raises(PhaseError):
        played.clients[0].advertise_keys()
    with pytest.raises(PhaseError):
        played.server.advertise_keys(0, early.advertise_keys())
    key_list = played.server.close_advertising()
    with pytest.raises(PhaseError):
        Client(agreed, IDENTITIES[0]).share_keys(key_list)
    answers = [client.share_keys(key_list) for client in played.clients.values()]
    with pytest.raises(PhaseError):
        played.clients[0].share_keys(key_list)
    for number, answer in enumerate(answers):
        played.server.share_keys(number, answer)
    with pytest.raises(PhaseError):
        played.server.share_keys(0, answers[0])
    relayed = played.server.close_sharing()
    message, words = played.clients[0].mask_input(relayed[0], *update(0))
    with pytest.raises(PhaseError):
        played.clients[0].mask_input(relayed[0], *update(0))
    with pytest.raises(TensorError):
        played.server.masked_input(0, message, words[:-1].data)
    with pytest.raises(PhaseError):
        played.server.masked_input(6, message, words.data)
    played.server.masked_input(0, message, words.data)
    with pytest.raises(PhaseError):
        played.server.masked_input(0, message, words.data)
    for number in range(1, 6):
        message, words = played.clients[number].mask_input(relayed[number], *update(number))
        played.server.masked_input(number, message, words.data)
    check(agreed, played.unmask(), set(range(6)))
    with pytest.raises(PhaseError):
        played.server.finish()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"neighbours": 6}, "neighbours"),
        ({"neighbours": 3}, "neighbours"),
        ({"threshold": 2}, "threshold"),
        ({"threshold": 6}, "threshold"),
        ({"largest_error": 1e-30}, "largest_error"),
        ({"members": MEMBERS[5::-1]}, "members"),
        ({"members": (*MEMBERS[:3], MEMBERS[2])}, "members"),
        ({"members": MEMBERS[:2]}, "members"),
        ({"length": 0}, "length"),
        ({"clip": float("nan")}, "clip"),
        ({"more": 1}, "more"),
    ],
)
def test_terms_that_contradict_themselves_are_refused(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        Terms.model_validate(terms().model_dump() | changes)


def test_an_update_of_another_length_or_a_stranger_is_refused() -> None:
    with pytest.raises(SchemaError, match="client-00007"):
        Client(terms(), IDENTITIES[7])
    played = Round.of(terms(), IDENTITIES[:6])
    played.advertise()
    played.share()
    relayed = played.server.close_sharing()
    with pytest.raises(TensorError):
        played.clients[0].mask_input(relayed[0], np.zeros(LENGTH + 1, np.float32), 1)
