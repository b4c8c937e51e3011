"""The messages inside the seal: each survives the wire; what is none of them is refused."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import SchemaError
from shared.payload.messages import (
    Backward,
    Confirm,
    Finished,
    Forward,
    Gradient,
    Hidden,
    Join,
    Leave,
    Mask,
    Masking,
    Message,
    Objection,
    Refusal,
    RoundStart,
    SumOf,
    Update,
    Welcome,
    pack,
    unpack_from_client,
    unpack_from_server,
)
from shared.payload.messages import frames_of as frames_due
from shared.payload.tensors import TensorInfo
from shared.secure_aggregation.messages import AdvertiseKeys, MaskedInput, UnmaskRequest
from shared.secure_aggregation.terms import Member

MEMBERS = tuple(Member(name=name, public_key=name * 64) for name in "abc")
INFO = TensorInfo(name="hidden", dtype="float32", shape=(3, 2))
FROM_CLIENT: list[Message] = [
    Confirm(),
    Join(request=1, rows=5),
    Forward(request=2, purpose="train", round=1, step=2, lengths=(2, 1), target_tokens=2, tensors=(INFO,)),
    Backward(request=3, forward=2, tensors=(INFO,)),
    Update(request=4, round=1, weight=9, tensors=(INFO, INFO)),
    Mask(request=5, round=1, weight=9, body=AdvertiseKeys(sealing=bytes(32), masking=bytes(32))),
    Mask(request=6, round=1, body=MaskedInput(words=3)),
    Mask(request=7, round=1, body=Objection(client=2)),
    Leave(),
]
FROM_SERVER: list[Message] = [
    Welcome(job="{}", config="a" * 64, tensor_table="b" * 64, weights="c" * 64),
    RoundStart(request=1, round=0, members=2, tensors=(INFO,)),
    RoundStart(request=1, round=0, members=3, sum=SumOf(members=MEMBERS, nonce="e" * 64)),
    Masking(request=2, body=UnmaskRequest(summed=(0, 2), dropped=(1,))),
    Hidden(request=2, tensors=(INFO,)),
    Gradient(request=3),
    Finished(request=4, rounds=3),
    Refusal(request=5, code="wrong_step", message="why"),
]


def frames_of(message: Message) -> list[Any]:
    return pack(message, [b""] * frames_due(message))


@pytest.mark.parametrize("message", FROM_CLIENT, ids=lambda m: type(m).__name__)
def test_clients_messages_survive_the_wire_and_servers_do_not_send_them(message: Message) -> None:
    assert unpack_from_client(frames_of(message))[0] == message
    with pytest.raises(SchemaError):
        unpack_from_server(frames_of(message))


@pytest.mark.parametrize("message", FROM_SERVER, ids=lambda m: type(m).__name__)
def test_servers_messages_survive_the_wire_and_clients_do_not_send_them(message: Message) -> None:
    assert unpack_from_server(frames_of(message))[0] == message
    with pytest.raises(SchemaError):
        unpack_from_client(frames_of(message))


GOOD = {"type": "join", "request": 1, "rows": 5}


@pytest.mark.parametrize(
    "fields",
    [
        {"more": 1},
        {"rows": -1},
        {"rows": 2**53},
        {"rows": "5"},
        {"rows": None},
        {"request": 0},
        {"type": "joined"},
        {"type": ["join"]},
    ],
)
def test_fields_out_of_bounds_are_refused(fields: dict[str, Any]) -> None:
    assert unpack_from_client([msgpack.packb(GOOD)])
    with pytest.raises(SchemaError):
        unpack_from_client([msgpack.packb(GOOD | fields)])


@pytest.mark.parametrize("lengths", [[], [0], [-1], [2**21], [1.5], "12"])
def test_row_lengths_out_of_bounds_are_refused(lengths: Any) -> None:
    message = FROM_CLIENT[2].model_dump() | {"lengths": lengths}
    with pytest.raises(SchemaError):
        unpack_from_client([msgpack.packb(message), b""])


def test_tensors_and_frames_must_agree() -> None:
    frames = frames_of(FROM_CLIENT[2])
    for wrong in (frames[:1], [*frames, b""], []):
        with pytest.raises(SchemaError):
            unpack_from_client(wrong)


def test_depth_bombs_and_giants_are_refused() -> None:
    with pytest.raises(SchemaError):
        unpack_from_client([b"\x91" * 100_000 + b"\xc0"])
    with pytest.raises(SchemaError, match="at most"):
        unpack_from_client([bytes(5 * 2**20)])


@given(st.lists(st.binary(max_size=60), max_size=3))
def test_any_bytes_are_a_message_or_a_schema_error(frames: list[Any]) -> None:
    try:
        unpack_from_client(frames)
    except SchemaError:
        return


def test_the_bytes_of_a_message_do_not_drift() -> None:
    assert pack(Join(request=1, rows=5))[0].hex() == "83a474797065a46a6f696ea77265717565737401a4726f777305"
