"""The messages inside the seal, each a typed schema with bounds; the first frame of every record is one of them.

    client                                   server
    ------                                   ------
                                             Welcome    the job, the trunk's checkpoint, what the seal is not
    Confirm    I am here
    Join       ready, with n rows
                                             RoundStart round r begins, here are the averages
    Forward    hidden states
                                             Hidden     hidden states after the trunk
    Backward   gradient of the loss
                                             Gradient   gradient for the head; the step is done
    Generate   hidden states that go on
                                             Hidden     hidden states after the trunk
    Release    the stream is over
    Update     head and tail after the round
                                             RoundStart (next round), or Finished
    Mask       in place of Update where updates are masked: four times, each a step of the secure sum (a ring: once)
                                             Masking (the next step), at last RoundStart or Finished
               under a group's key a fifth time, from one client: it opens the sum for all
    Leave
                                             Refusal    in place of any answer

Tensors follow as frames of their own, in the order of `tensors`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from shared.errors import SchemaError
from shared.payload.pieces import Piece
from shared.payload.schema import Count, Hex
from shared.payload.schema import Message as Message
from shared.payload.tensors import TensorInfo
from shared.secure_aggregation.messages import (
    AdvertiseKeys,
    ClientNumber,
    GroupSum,
    KeyList,
    MaskedInput,
    RelayedShares,
    RingInput,
    RingKey,
    RingKeys,
    RingRound,
    ShareKeys,
    Unmask,
    UnmaskRequest,
)
from shared.secure_aggregation.terms import MAX_CLIENTS, MAX_WEIGHT, MIN_CLIENTS, Member
from shared.wire.envelope import MAX_BODY_FRAMES, Frame

MAX_MESSAGE_BYTES = 4 * 2**20
MAX_ROWS = 65_536
# The name of a tensor's control variate (SCAFFOLD) in RoundStart and Finished: this, then the tensor's own.
CONTROL = "control/"
# Of what is added to a module's frozen weight (FedEx-LoRA), without LoRA's scaling: this, then the module's name.
RESIDUAL = "residual/"

RequestId = Annotated[int, Field(ge=1, lt=2**53)]
Lengths = Annotated[tuple[Annotated[int, Field(ge=1, le=1_048_576)], ...], Field(min_length=1, max_length=MAX_ROWS)]
Reason = Annotated[str, Field(max_length=500)]
Purpose = Literal["train", "evaluate"]


class WithTensors(Message):
    tensors: Annotated[tuple[TensorInfo, ...], Field(max_length=MAX_BODY_FRAMES - 1)] = ()


class WithPieces(WithTensors):
    """`pieces`: part of a difference in place of values, a frame each, after those of the tensors."""

    pieces: Annotated[tuple[Piece, ...], Field(max_length=MAX_BODY_FRAMES - 1)] = ()


class Welcome(Message):
    """Server's first record: the job as canonical JSON and the fingerprint of the checkpoint it cut its trunk from."""

    type: Literal["welcome"] = "welcome"
    job: Annotated[str, Field(max_length=2**20)]
    config: Hex
    tensor_table: Hex
    weights: Hex


class Confirm(Message):
    """The client's first record, at once: it is really there, and may now take its time to load data and model."""

    type: Literal["confirm"] = "confirm"


class Join(Message):
    """The client is ready to train on `rows` rows."""

    type: Literal["join"] = "join"
    request: RequestId
    rows: Count


class SumOf(Message):
    """Whose updates the round's masked sum is of, by name, and 32 random bytes that no other try at it has.

    Of a ring: its members and its nonce, the same for as long as it stays; and `ring`, the sum's number and those of
    the ring whose updates it is of. None: the ring is to be made, and its first sum is number 0, of all who are in it.
    """

    members: Annotated[tuple[Member, ...], Field(min_length=MIN_CLIENTS, max_length=MAX_CLIENTS)]
    nonce: Hex
    ring: RingRound | None = None


class Sealed(Message):
    """Under a group's key: averages of head and tail with which round `round` begins, or that the job ends with.

    Its frame, a box that only clients open (shared/sealed_averages.py), comes last.
    """

    type: Literal["sealed"] = "sealed"
    round: Count


class Unopened(Message):
    """In place of Sealed: the sum does not open under this client's group key."""

    type: Literal["unopened"] = "unopened"


class RoundStart(WithPieces):
    """Answers Join, Update or the last Mask: round `round` (from 0) begins. Tensors: head and tail averages, if any;
    control variates; residuals. Pieces, not in answer to a Join: the averages' difference to what the round before
    began with.

    `sum`: where updates are masked. `sealed`: in place of averages, under a group's key. `refused`: why the update that
    this answers did not count, if so. `counted`: how many rounds were complete when one of this client last did, 0 if
    none has; None where the server cannot say (a replica).
    """

    type: Literal["round_start"] = "round_start"
    request: RequestId
    round: Count
    members: Count
    sum: SumOf | None = None
    sealed: Sealed | None = None
    refused: Reason | None = None
    counted: Count | None = None


class Forward(WithTensors):
    """Hidden states (T, d) of rows with `lengths` tokens, T their sum; micro-batch `micro_batch` of a step.

    `target_tokens`: how many tokens count in the loss of the whole step, this client's share of the cohort's loss.
    """

    type: Literal["forward"] = "forward"
    request: RequestId
    purpose: Purpose
    round: Count = 0
    step: Count = 0
    micro_batch: Count = 0
    lengths: Lengths
    target_tokens: Count
    wants_gradient: bool = True


class Hidden(WithTensors):
    """The trunk's output (T, d) for Forward or Generate `request`."""

    type: Literal["hidden"] = "hidden"
    request: RequestId


class Backward(WithTensors):
    """d(mean loss over the target tokens of the client's step) / d(hidden), (T, d), for the Forward `forward`."""

    type: Literal["backward"] = "backward"
    request: RequestId
    forward: RequestId


class Gradient(WithTensors):
    """d(the client's mean loss) / d(head's output), (T, d), or no tensor if it was not wanted.

    Answers Backward `request`.
    """

    type: Literal["gradient"] = "gradient"
    request: RequestId


class Generate(WithTensors):
    """Hidden states (T, d) of rows that go on from what stream `stream` holds; a new number opens a stream.

    Later requests of a stream have as many rows as its first. Answered by Hidden.
    """

    type: Literal["generate"] = "generate"
    request: RequestId
    stream: RequestId
    lengths: Lengths


class Release(Message):
    """Forget stream `stream`. Not answered."""

    type: Literal["release"] = "release"
    stream: RequestId


class Update(WithPieces):
    """What the client trains in head and tail after the local steps of `round`, weighted `weight` in the average; or in
    pieces its difference to what the round began with.
    """

    type: Literal["update"] = "update"
    request: RequestId
    round: Count
    weight: Annotated[int, Field(ge=1, lt=2**53)]


class Objection(Message):
    """In place of MaskedInput: what client `client` sealed for this one does not open, or is not what it promised."""

    type: Literal["objection"] = "objection"
    client: ClientNumber


class Mask(Message):
    """A client's next step in the masked sum of `round`; with MaskedInput, RingInput or Sealed, its frame follows.

    `weight`: what the client's own adapter in the trunk is weighted by, where it has one (0: it has none); with
    AdvertiseKeys or RingInput. It is no
    news to the server, which is told with every Forward how many tokens count.
    """

    type: Literal["mask"] = "mask"
    request: RequestId
    round: Count
    weight: Annotated[int, Field(ge=0, le=MAX_WEIGHT)] = 0
    body: Annotated[
        AdvertiseKeys | ShareKeys | MaskedInput | Objection | Unmask | Sealed | Unopened | RingKey | RingInput,
        Field(discriminator="type"),
    ]


class Masking(Message):
    """The server's answer to a Mask, when everybody's is there, or will not come. RingRound: the sum before lacks
    members, and is done again without them.

    GroupSum is for one client, which opens it for all; its frame of words follows.
    """

    type: Literal["masking"] = "masking"
    request: RequestId
    body: Annotated[
        KeyList | RelayedShares | UnmaskRequest | GroupSum | RingKeys | RingRound, Field(discriminator="type")
    ]


class Finished(WithPieces):
    """Answers Join, Update or the last Mask: the job is done. Tensors: the last averages. The rest as in RoundStart."""

    type: Literal["finished"] = "finished"
    request: RequestId
    rounds: Count
    sealed: Sealed | None = None
    refused: Reason | None = None
    counted: Count | None = None


class Leave(Message):
    type: Literal["leave"] = "leave"


class Refusal(Message):
    """An error, in place of an answer to `request` (if it was one). `code` is that of shared/errors.py or our own."""

    type: Literal["refusal"] = "refusal"
    request: RequestId | None = None
    code: Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]
    message: Reason


FromClient = Confirm | Join | Forward | Backward | Generate | Release | Update | Mask | Leave
FromServer = Welcome | RoundStart | Hidden | Gradient | Masking | Finished | Refusal

CLIENT_MESSAGES: TypeAdapter[FromClient] = TypeAdapter(Annotated[FromClient, Field(discriminator="type")])
SERVER_MESSAGES: TypeAdapter[FromServer] = TypeAdapter(Annotated[FromServer, Field(discriminator="type")])


def frames_of(message: Message) -> int:
    """How many frames follow the message."""
    if isinstance(message, WithTensors):
        box = isinstance(message, RoundStart | Finished) and message.sealed is not None
        return len(message.tensors) + len(message.pieces if isinstance(message, WithPieces) else ()) + box
    return int(
        isinstance(message, Mask | Masking) and isinstance(message.body, MaskedInput | RingInput | Sealed | GroupSum)
    )


def pack(message: Message, tensors: Sequence[Frame] = ()) -> list[Frame]:
    """The plaintext frames of a record: the message, then its tensors' bytes."""
    return [msgpack.packb(message.model_dump()), *tensors]


def unpack_from_client(frames: Sequence[Frame]) -> tuple[FromClient, Sequence[Frame]]:
    """A client's message and its tensor frames. Raises SchemaError; has no effect otherwise."""
    return _unpack(CLIENT_MESSAGES, frames)


def unpack_from_server(frames: Sequence[Frame]) -> tuple[FromServer, Sequence[Frame]]:
    """A server's message and its tensor frames. Raises SchemaError; has no effect otherwise."""
    return _unpack(SERVER_MESSAGES, frames)


def message_of(schema: TypeAdapter[Any], frame: Frame) -> Any:
    """What a peer's first frame says, by one of the closed schemas. Raises SchemaError; has no effect otherwise."""
    if memoryview(frame).nbytes > MAX_MESSAGE_BYTES:
        raise SchemaError(f"a message has at most {MAX_MESSAGE_BYTES} bytes")
    try:
        return schema.validate_python(msgpack.unpackb(frame, strict_map_key=True, use_list=False))
    except (ValueError, ValidationError, msgpack.UnpackException) as error:
        raise SchemaError(f"a message that breaks its schema ({type(error).__name__})") from None


def _unpack(schema: TypeAdapter[Any], frames: Sequence[Frame]) -> tuple[Any, Sequence[Frame]]:
    if not frames:
        raise SchemaError("a record without frames")
    message = message_of(schema, frames[0])
    tensors = frames[1:]
    announced = frames_of(message)
    if announced != len(tensors):
        raise SchemaError(f"{announced} frames announced, {len(tensors)} came")
    return message, tensors
