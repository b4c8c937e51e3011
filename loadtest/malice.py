"""What a client sends that has been admitted, has read the protocol, and means no good."""

import random
from collections.abc import Callable, Sequence

import torch

from shared import PROTOCOL_VERSION
from shared.payload.messages import Backward, Forward, Generate, Join, Release, Update
from shared.payload.messages import pack as pack_message
from shared.payload.tensors import encode
from shared.secure.records import Channel
from shared.wire.envelope import Accept, Close, Data, Frame, Hello, Open, Ping, pack

# Announcements of more than there is, and nesting that a careless parser follows to the end of its stack.
BOMBS = (
    b"\x91" * 4000,
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x81" * 2000 + b"\xc0",
    b"\xdd\x7f\xff\xff\xff",
)


def mutate(chance: random.Random, frames: Sequence[Frame]) -> list[bytes]:
    """One to three changes to a message's frames: flipped, cut, longer, repeated, gone, shuffled, replaced, many."""
    changed = [bytes(frame) for frame in frames]
    for _ in range(chance.randint(1, 3)):
        if not changed:
            return [chance.randbytes(8)]
        index = chance.randrange(len(changed))
        frame = changed[index]
        match chance.randrange(9):
            case 0:
                flipped = bytearray(frame or b"\0")
                flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
                changed[index] = bytes(flipped)
            case 1:
                changed[index] = frame[: chance.randrange(len(frame) + 1)]
            case 2:
                changed[index] = frame + chance.randbytes(chance.randrange(1, 40))
            case 3:
                changed.insert(index, frame)
            case 4:
                del changed[index]
            case 5:
                chance.shuffle(changed)
            case 6:
                changed[index] = chance.choice(BOMBS)
            case 7:
                changed[index] = chance.randbytes(chance.randrange(200))
            case _:
                changed.extend([b"x"] * chance.choice((1, 50)))
    return changed or [b""]


class Malice:
    """Messages of four kinds for an open session: `kinds` makes the frames of one."""

    def __init__(self, chance: random.Random, session: bytes, channel: Channel) -> None:
        self.chance = chance
        self.session = session
        self.channel = channel
        self.kinds: dict[str, Callable[[], list[Frame]]] = {
            "no message": self._garbage,
            "mutated envelope": self._envelope,
            "record that does not open": self._forged,
            "record with other contents": self._sealed,
        }

    def _garbage(self) -> list[Frame]:
        return [self.chance.randbytes(self.chance.randrange(60)) for _ in range(self.chance.randrange(1, 6))]

    def _envelope(self) -> list[Frame]:
        chance = self.chance
        header = chance.choice(
            (
                Ping(),
                Hello(
                    version=PROTOCOL_VERSION,
                    role=chance.choice(("client", "server")),
                    identity=chance.choice((None, bytes(32))),
                ),
                Open(
                    version=PROTOCOL_VERSION,
                    session=chance.randbytes(16),
                    server=chance.randbytes(32),
                    job=bytes(32),
                ),
                Accept(session=self.session),
                Data(session=chance.choice((self.session, bytes(16))), sequence=chance.randrange(2**20)),
                Close(session=bytes(16), code="over", message="x"),
            )
        )
        body: list[Frame] = [b"x"] if isinstance(header, Open | Accept | Data) else []
        return list(mutate(chance, pack(header, body).frames()))

    def _forged(self) -> list[Frame]:
        sequence = self.channel.sealer.sequence + self.chance.choice((0, 0, 1, -1))
        header = Data(session=self.session, sequence=max(0, sequence))
        return pack(header, [self.chance.randbytes(self.chance.randrange(80)) for _ in range(2)]).frames()

    def _sealed(self) -> list[Frame]:
        chance = self.chance
        info, frame = encode("hidden", torch.randn(3, 32), "float32")
        request = chance.randrange(2**31)
        message = chance.choice(
            (
                Join(request=request, rows=3),
                Forward(request=request, purpose="train", lengths=(3,), target_tokens=2, tensors=(info,)),
                Backward(request=request, forward=1, tensors=(info.model_copy(update={"name": "gradient"}),)),
                Update(request=request, round=0, weight=1, tensors=(info,)),
                Generate(request=request, stream=1, lengths=(3,), tensors=(info,)),
                Release(stream=1),
            )
        )
        frames = pack_message(message, [] if isinstance(message, Join | Release) else [frame])
        return self.channel.seal(mutate(chance, frames)).frames()
