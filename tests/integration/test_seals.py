"""What a broker can read (nothing) and do (only delay): a recording broker, and one that attacks every record."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import msgpack
import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from broker.guard import Guest
from broker.routing import Peer, Router, Send
from broker.settings import BrokerSettings
from launcher.in_process import CLIENTS, Outcome, Site, serving, train_in_process, trunk_tensors
from shared.errors import ConnectionFailed, EnvelopeError, FrameError, Refused
from shared.identity import generate_identity
from shared.job import Job, Wire, WireFormat
from shared.model.plan import PartName
from shared.payload.tensors import encode
from shared.secure.records import Channel
from shared.wire.curve import Door
from shared.wire.envelope import Data, Envelope, Frame, parse
from worker_client.batches import pack_rows
from worker_client.data import Row
from worker_client.link import Link
from worker_client.remote_trunk import RemoteTrunk

PARTS: tuple[PartName, ...] = ("head", "trunk", "tail")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 2))
    return made.model_copy(update={"rounds": made.rounds.model_copy(update={"count": 2, "local_steps": 2})})


def sites() -> dict[str, Site]:
    return {name: Site(random_rows(8, seed)) for seed, name in enumerate(("a", "b"))}


def values(outcomes: dict[str, Outcome], folder: Path) -> dict[str, Tensor]:
    trained = trunk_tensors(folder)
    for name, outcome in outcomes.items():
        trained |= {f"{name}/{key}": p.detach() for key, p in outcome.parts.parameters.items()}
    return trained


def assert_bit_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


class RecordingRouter(Router):
    """Keeps every byte that a broker gets to see."""

    def __init__(self) -> None:
        super().__init__(BrokerSettings())
        self.seen = bytearray()

    def handle(self, peer: Peer, frames: Sequence[Frame], now: float, guest: Guest | None = None) -> list[Send]:
        for frame in frames:
            self.seen += bytes(frame)
        return super().handle(peer, frames, now, guest)


@pytest.mark.parametrize("wire_format", get_args(WireFormat))
def test_nothing_that_matters_is_readable_at_the_broker(
    wire_format: WireFormat, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = bytearray()
    tensors: list[bytes] = []
    sealed = Channel.seal

    def keep(channel: Channel, frames: list[Frame]) -> Envelope:
        plain.extend(b"".join(bytes(frame) for frame in frames))
        tensors.extend(bytes(frame) for frame in frames[1:])
        return sealed(channel, frames)

    monkeypatch.setattr(Channel, "seal", keep)
    router = RecordingRouter()
    clients = sites()
    job = job.model_copy(update={"wire": Wire(hidden=wire_format, gradient=wire_format)})
    outcomes = train_in_process(job, clients, tmp_path / "run", router)
    assert len(router.seen) > 0.9 * len(plain)
    # Both ways in each of two rounds of two steps: hidden states and gradients; and the heads and tails.
    assert len(tensors) > 2 * 2 * 2 * 4

    secrets = [job.canonical(), b"hidden", b"lengths", b"welcome"]
    # The last average, as it came from the server.
    secrets += [bytes(encode("", p.detach(), "float32")[1])[:64] for p in outcomes["a"].parts.parameters.values()]
    secrets += [piece for tensor in tensors for piece in (tensor[:16], tensor[-16:])]
    readable = [secret in plain for secret in secrets]
    assert all(readable), "the search must find in the plaintext what it does not find at the broker"
    assert not any(secret in router.seen for secret in secrets)
    # Token ids cross in no form, sealed or not.
    for row in clients["a"].train:
        if len(row.input_ids) > 4:
            for form in (msgpack.packb(list(row.input_ids)), *(_ids(row, size) for size in (2, 4, 8))):
                assert form not in plain
                assert form not in router.seen


def _ids(row: Row, size: int) -> bytes:
    return b"".join(token.to_bytes(size, "little") for token in row.input_ids)


class AttackingRouter(Router):
    """Sends, before every record, forged ones: each frame with a bit flipped, a replay, a later number, another's."""

    def __init__(self) -> None:
        super().__init__(BrokerSettings())
        self.last: dict[tuple[Peer, bytes], Envelope] = {}
        self.forged = 0

    def handle(self, peer: Peer, frames: Sequence[Frame], now: float, guest: Guest | None = None) -> list[Send]:
        sends = super().handle(peer, frames, now, guest)
        attacked: list[Send] = []
        for send in sends:
            if isinstance(send.envelope.header, Data):
                for envelope in self.forgeries(send):
                    self.forged += 1
                    attacked.append(Send(send.to, envelope))
                self.last[send.to, send.envelope.header.session] = send.envelope
            attacked.append(send)
        return attacked

    def forgeries(self, send: Send) -> Iterator[Envelope]:
        frames = [bytes(frame) for frame in send.envelope.frames()]
        for index, frame in enumerate(frames):
            for position in (0, len(frame) - 1):
                yield from _parsed([*frames[:index], _flipped(frame, position), *frames[index + 1 :]])
        header = send.envelope.header
        assert isinstance(header, Data)
        later = msgpack.packb(Data(session=header.session, sequence=header.sequence + 1).model_dump())
        yield from _parsed([frames[0], later, *frames[2:]])
        yield from _parsed([*frames, frames[-1]])
        for (to, session), envelope in self.last.items():
            if session == header.session:
                if to == send.to:
                    yield envelope  # a replay; or, to the other end, a reflection
            else:
                yield from _parsed([frames[0], frames[1], *(bytes(frame) for frame in envelope.body)])


def _flipped(frame: bytes, position: int) -> bytes:
    changed = bytearray(frame)
    changed[position] ^= 1
    return bytes(changed)


def _parsed(frames: list[bytes]) -> Iterator[Envelope]:
    """What still passes for a message; the rest, a peer refuses before it looks further (tests/shared/wire)."""
    try:
        envelope = parse(frames)
    except (FrameError, EnvelopeError):
        return
    if isinstance(envelope.header, Data):
        yield envelope


def test_forged_records_change_nothing(job: Job, tmp_path: Path) -> None:
    undisturbed = values(train_in_process(job, sites(), tmp_path / "calm"), tmp_path / "calm")
    router = AttackingRouter()
    # A session that an attack leaves open is waited for at the end.
    attacked = train_in_process(job, sites(), tmp_path / "attacked", router, farewell_s=10.0)
    assert router.forged > 100
    assert_bit_equal(values(attacked, tmp_path / "attacked"), undisturbed)


def test_each_forgery_is_refused_with_its_own_code(job: Job, tmp_path: Path) -> None:
    router = AttackingRouter()
    batch = pack_rows(random_rows(2, 0))
    with serving(job, tmp_path, ["a", "b"], router) as running, running.link("a") as link:
        for _ in range(2):  # once answered, all that was forged before has been looked at
            RemoteTrunk(link, job, 60).evaluate(torch.zeros(batch.tokens, 32), batch)
    service = running.running.service
    assert service is not None
    assert service.counters["refused_seal"] > 0
    assert service.counters["refused_order"] > 0
    assert service.counters["refused_replay"] > 0


def test_an_unknown_key_is_refused_and_others_go_on(job: Job, tmp_path: Path) -> None:
    stranger = generate_identity("a")
    with serving(job, tmp_path, ["a"]) as running:
        with (
            running.link("a"),
            pytest.raises(Refused) as refused,
            Link(Door(CLIENTS), stranger, running.server.public, job.digest(), context=running.context),
        ):
            pass
        assert refused.value.reason == "unknown_client"


def test_another_job_is_refused(job: Job, tmp_path: Path) -> None:
    other = job.model_copy(update={"name": "other"})
    with serving(job, tmp_path, ["a"]) as running:
        link = Link(Door(CLIENTS), running.clients["a"], running.server.public, other.digest(), context=running.context)
        with pytest.raises(Refused) as refused, link:
            pass
    assert refused.value.reason == "job_differs"


def test_a_server_that_is_not_there_ends_in_a_bounded_wait(job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"]) as running:
        link = Link(
            Door(CLIENTS),
            running.clients["a"],
            generate_identity("elsewhere").public,
            job.digest(),
            context=running.context,
            connect_timeout_s=0.5,
        )
        with pytest.raises(ConnectionFailed, match="not at the broker"), link:
            pass
