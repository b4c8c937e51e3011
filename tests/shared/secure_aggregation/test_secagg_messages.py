"""Messages are bounded, survive the wire, and their bytes are frozen: neither drifts silently."""

import hashlib
from typing import Any

import msgpack
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import TypeAdapter, ValidationError

from shared.identity import Identity, card_of
from shared.payload.messages import pack
from shared.secure_aggregation.client import Client
from shared.secure_aggregation.messages import (
    CLIENT_MESSAGES,
    SERVER_MESSAGES,
    AdvertiseKeys,
    ClientKeys,
    GroupSum,
    KeyList,
    MaskedInput,
    PublicKey,
    RelayedShares,
    RingInput,
    RingKey,
    RingKeys,
    RingRound,
    SealedShares,
    Share,
    ShareKeys,
    Unmask,
    UnmaskRequest,
)
from shared.secure_aggregation.server import Server
from shared.secure_aggregation.terms import Terms, roster
from shared.wire.curve import LinkKeys

K = bytes(range(32))
BOXES = (SealedShares(client=1, box=bytes(82), self_commitment=K, key_commitment=K),)
SHARES = (Share(client=1, share=bytes(33)),)
PUBLIC = (PublicKey(client=1, key=K),)
CLIENTS: list[Any] = [
    AdvertiseKeys(sealing=K, masking=K),
    ShareKeys(seed_commitment=K, shares=BOXES),
    MaskedInput(words=3),
    Unmask(self_shares=SHARES, key_shares=SHARES),
    RingKey(key=K),
    RingInput(sequence=1, words=3),
]
SERVERS: list[Any] = [
    KeyList(keys=(ClientKeys(client=1, sealing=K, masking=K),)),
    RelayedShares(shares=BOXES),
    UnmaskRequest(summed=(1, 2), dropped=(3,)),
    GroupSum(contributors=2, words=3),
    RingKeys(keys=PUBLIC),
    RingRound(sequence=1, members=(1, 2, 3)),
]
BOTH = [*((CLIENT_MESSAGES, m) for m in CLIENTS), *((SERVER_MESSAGES, m) for m in SERVERS)]
IDS = [message.type for _, message in BOTH]


def across(schema: TypeAdapter[Any], document: object) -> Any:
    return schema.validate_python(msgpack.unpackb(msgpack.packb(document), strict_map_key=True, use_list=False))


@pytest.mark.parametrize(("schema", "message"), BOTH, ids=IDS)
def test_messages_survive_the_wire_and_refuse_what_is_not_theirs(schema: TypeAdapter[Any], message: Any) -> None:
    assert schema.validate_python(msgpack.unpackb(bytes(pack(message)[0]), use_list=False)) == message
    document = message.model_dump()
    for name, value in document.items():
        wrong: list[Any] = [None, "x", -1, 2**53, 1.5, b"", b"x" * 31, b"x" * 100, (1,) * 10_001, ((),)]
        for other in wrong:
            if other != value:
                with pytest.raises(ValidationError):
                    across(schema, document | {name: other})
        with pytest.raises(ValidationError):
            across(schema, {key: document[key] for key in document if key != name})
    with pytest.raises(ValidationError):
        across(schema, document | {"more": 1})


def test_the_largest_message_fits_the_wires_bound() -> None:
    keys = tuple(ClientKeys(client=n, sealing=K, masking=K) for n in range(10_000))
    boxes = tuple(SealedShares(client=n, box=bytes(82), self_commitment=K, key_commitment=K) for n in range(10_000))
    for message in (KeyList(keys=keys), ShareKeys(seed_commitment=K, shares=boxes)):
        assert len(pack(message)[0]) < 4 * 2**20
    with pytest.raises(ValidationError):
        KeyList(keys=(*keys, keys[0]))


def fixed_identity(number: int) -> Identity:
    private = X25519PrivateKey.from_private_bytes(bytes([number + 1]) * 32)
    return Identity(f"client-{number}", private, private.public_key().public_bytes_raw(), LinkKeys.from_secret(K))


class Counting:
    """Bytes that follow from a seed, in order."""

    def __init__(self, seed: int) -> None:
        self.state = hashlib.shake_256(bytes([seed])).digest(2**16)

    def __call__(self, size: int) -> bytes:
        taken, self.state = self.state[:size], self.state[size:]
        return taken


def digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()[:16]


def test_frozen_vector() -> None:
    """Four clients with fixed keys and randomness: terms, keys, boxes, graph, masks and shares, byte by byte."""
    identities = [fixed_identity(number) for number in range(4)]
    terms = Terms(
        label="ab" * 32,
        members=roster([card_of(identity) for identity in identities]),
        length=5,
        clip=1.0,
        max_weight=4,
        largest_error=1e-6,
        neighbours=3,
        threshold=2,
    )
    clients = [Client(terms, identity, random=Counting(n)) for n, identity in enumerate(identities)]
    server = Server(terms)
    for client in clients:
        server.advertise_keys(client.number, client.advertise_keys())
    key_list = server.close_advertising()
    shared = [client.share_keys(key_list) for client in clients]
    for client, message in zip(clients, shared, strict=True):
        server.share_keys(client.number, message)
    relayed = server.close_sharing()
    values = np.array([0.5, -0.25, 0, 1, -2], np.float32)
    masked = [client.mask_input(relayed[client.number], values, client.number + 1) for client in clients]
    for client, (announced, words) in zip(clients[:3], masked, strict=False):
        server.masked_input(client.number, announced, words.data)
    requests = server.close_inputs()
    unmask = [client.unmask(requests[client.number]) for client in clients[:3]]
    for client, answer in zip(clients, unmask, strict=False):
        server.unmask(client.number, answer)
    made = server.finish()
    seen = {
        "terms": digest(terms.digest),
        "key list": digest(bytes(pack(key_list)[0])),
        "shares of 0": digest(bytes(pack(shared[0])[0])),
        "words of 0": digest(masked[0][1].tobytes()),
        "words of 3": digest(masked[3][1].tobytes()),
        "unmask of 0": digest(bytes(pack(unmask[0])[0])),
        "sum": made.words.tolist(),
    }
    assert seen == FROZEN
    assert made.mean(terms)[0].tolist() == [0.5, -0.25, 0, 1, -1]


FROZEN = {
    "terms": "418bd471b22a8b45",
    "key list": "03c6af37691ec81c",
    "shares of 0": "d6479fa54ff7189b",
    "words of 0": "986de4ba93ad9b05",
    "words of 3": "b720ebb4b34234d8",
    "unmask of 0": "ef8eef040940d760",
    "sum": [201326592, 4194304000, 0, 402653184, 3892314112, 6],
}
