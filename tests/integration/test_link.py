"""The client's line to its server, over a real broker: greetings changed on the way, versions, waits that end."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shared.wire.connection
import worker_client.link
from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from broker.guard import Guest
from broker.routing import Peer, Router, Send
from broker.settings import BrokerSettings
from launcher.in_process import CLIENTS, Background, Serving, serving
from shared import PROTOCOL_VERSION
from shared.errors import ConnectionFailed, DeadlineExceeded, FlglmError, HandshakeError, Refused, SchemaError
from shared.identity import generate_identity, key_digest
from shared.job import Job
from shared.payload.messages import Join
from shared.secure.handshake import ClientHandshake
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Accept, Close, Envelope, Frame, Header, Open, pack
from worker_client.batches import Batch, pack_rows
from worker_client.link import MAX_IN_FLIGHT, Link
from worker_client.remote_trunk import RemoteTrunk

WAIT_S = 60.0
WIDTH = 32


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 1))
    return made.model_copy(update={"rounds": made.rounds.model_copy(update={"count": 1, "local_steps": 2})})


class ChangingRouter(Router):
    """Changes the body of every message of one kind, and may send greetings to another server than they name."""

    def __init__(self, kind: type[Header], change: Callable[[Envelope], Envelope]) -> None:
        super().__init__(BrokerSettings())
        self.kind = kind
        self.change = change

    def handle(self, peer: Peer, frames: Sequence[Frame], now: float, guest: Guest | None = None) -> list[Send]:
        return [
            send._replace(envelope=self.change(send.envelope)) if isinstance(send.envelope.header, self.kind) else send
            for send in super().handle(peer, frames, now, guest)
        ]


def flipped(envelope: Envelope) -> Envelope:
    body = bytearray(envelope.body[0])
    body[40] ^= 1
    return replace(envelope, body=[body])


def impostor(running: Serving, server: bytes) -> None:
    """Give the only server another one's name, as a broker could."""
    router = running.broker.router
    (router.servers[key_digest(server)],) = list(router.servers.values())


def forward(trunk: RemoteTrunk, hidden: Tensor, batch: Batch, *, step: int, wants_gradient: bool) -> tuple[int, Tensor]:
    pending = trunk.send_forward(
        hidden,
        batch,
        round=0,
        step=step,
        micro_batch=0,
        target_tokens=batch.target_tokens,
        wants_gradient=wants_gradient,
    )
    return pending.request, trunk.hidden(pending)


def backward(trunk: RemoteTrunk, request: int, gradient: Tensor) -> Tensor | None:
    return trunk.gradient(trunk.send_backward(request, gradient))


def fails(link: Link) -> FlglmError:
    with pytest.raises(FlglmError) as error, link:
        pass
    return error.value


@pytest.mark.parametrize("kind", [Open, Accept])
def test_a_greeting_changed_on_the_way_is_found_out(kind: type[Header], job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"], ChangingRouter(kind, flipped)) as running:
        assert isinstance(fails(running.link("a")), HandshakeError)
        assert running.running.service is not None
        assert running.running.service.counters["refused_handshake"] == (kind is Open)
        assert running.running.service.rounds.active == {}


def test_another_key_than_the_invitations_is_found_out(job: Job, tmp_path: Path) -> None:
    trusted = generate_identity("trusted")
    with serving(job, tmp_path, ["a"]) as running:
        with running.link("a"):
            impostor(running, trusted.public)
        link = Link(Door(CLIENTS), running.clients["a"], trusted.public, job.digest(), context=running.context)
        assert isinstance(fails(link), HandshakeError)


def test_brokers_and_servers_of_another_version_say_so(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(job, tmp_path, ["a"]) as running:
        with running.link("a"):
            pass
        with monkeypatch.context() as patch:
            patch.setattr(worker_client.link, "PROTOCOL_VERSION", 99)
            refused = fails(running.link("a"))
        assert isinstance(refused, Refused)
        assert refused.reason == "version"
        assert "99" in refused.message
        with monkeypatch.context() as patch:
            patch.setattr(shared.wire.connection, "PROTOCOL_VERSION", 99)
            refused = fails(running.link("a"))
        assert isinstance(refused, ConnectionFailed)
        assert "99" in refused.message


def test_a_broker_that_is_not_there_ends_in_a_bounded_wait(job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"]) as running:
        link = Link(
            Door("inproc://nobody"),
            running.clients["a"],
            running.server.public,
            job.digest(),
            connect_timeout_s=0.2,
            context=running.context,
        )
        error = fails(link)
    assert isinstance(error, ConnectionFailed)
    assert "no broker answers" in error.message


def test_tensors_go_in_and_come_out(job: Job, tmp_path: Path) -> None:
    batch = pack_rows(random_rows(3, 0))
    hidden = torch.randn(batch.tokens, WIDTH)
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        trunk = RemoteTrunk(link, job, WAIT_S)
        start = trunk.join(3)
        assert (start.round, start.members, start.averages) == (0, 1, {})
        evaluated = trunk.evaluate(hidden, batch)
        request, output = forward(trunk, hidden, batch, step=0, wants_gradient=True)
        assert output.shape == hidden.shape
        torch.testing.assert_close(output, evaluated)
        gradient = backward(trunk, request, torch.randn(hidden.shape))
        assert gradient is not None
        assert gradient.shape == hidden.shape
        request, _ = forward(trunk, hidden, batch, step=1, wants_gradient=False)
        assert backward(trunk, request, torch.randn(hidden.shape)) is None


def test_an_answer_of_another_kind_is_an_error(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack_rows(random_rows(1, 0))
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        start = link.wait(link.send(Join(request=link.next_request(), rows=1)), WAIT_S, "no answer")
        monkeypatch.setattr(link, "wait", lambda *_, **__: start)
        with pytest.raises(SchemaError, match="round_start"):
            RemoteTrunk(link, job, WAIT_S).evaluate(torch.zeros(batch.tokens, WIDTH), batch)


def test_a_refusal_reaches_its_request_alone(job: Job, tmp_path: Path) -> None:
    batch = pack_rows(random_rows(3, 0))
    hidden = torch.randn(batch.tokens, WIDTH)
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        trunk = RemoteTrunk(link, job, WAIT_S)
        trunk.join(3)
        with pytest.raises(Refused) as refused:
            forward(trunk, hidden, batch, step=1, wants_gradient=True)
        assert refused.value.reason == "wrong_step"
        with pytest.raises(Refused) as refused:
            backward(trunk, 1, hidden)
        assert refused.value.reason == "wrong_step"
        forward(trunk, hidden, batch, step=0, wants_gradient=True)


def test_an_answer_that_does_not_come_is_not_waited_for_for_ever(job: Job, tmp_path: Path) -> None:
    pair = job.model_copy(update={"cohort": job.cohort.model_copy(update={"clients": 2})})
    with (
        serving(pair, tmp_path, ["a", "b"]) as running,
        running.link("a") as link,
        pytest.raises(DeadlineExceeded, match="no round began: the job waits for its other members") as error,
    ):
        RemoteTrunk(link, pair, 0.1).join(3)
    assert error.value.hint == "run the same command to resume; --wait SECONDS waits longer"


def test_when_the_server_stops_whoever_waits_is_told(job: Job, tmp_path: Path) -> None:
    pair = job.model_copy(update={"cohort": job.cohort.model_copy(update={"clients": 2})})
    with serving(pair, tmp_path, ["a"]) as running, running.link("a") as link:
        waiting = Background("a", lambda: RemoteTrunk(link, pair, WAIT_S).join(3))
        batch = pack_rows(random_rows(1, 0))
        RemoteTrunk(link, pair, WAIT_S).evaluate(torch.zeros(batch.tokens, WIDTH), batch)
        running.running.stop()
        with pytest.raises(ConnectionFailed, match="server stops"):
            waiting.join()
        with pytest.raises(ConnectionFailed, match="server stops"):
            RemoteTrunk(link, pair, WAIT_S).join(3)


def test_a_call_that_crosses_the_links_end_is_not_left_waiting(job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"]) as running:
        with running.link("a") as link:
            pass
        ended, link.failure = link.failure, None
        # The link's end falls between the first look at `failure` and the queue.
        link.waker.wake = lambda: setattr(link, "failure", ended)  # type: ignore[method-assign]
        with pytest.raises(ConnectionFailed, match="closed"):
            link.send(Join(request=1, rows=1))


def test_requests_that_wait_to_be_sent_are_bounded(job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"]) as running, running.link("a"):
        idle = running.link("a")
        with idle.connection:
            for request in range(MAX_IN_FLIGHT):
                idle.send(Join(request=request + 1, rows=1))
            with pytest.raises(ConnectionFailed, match="wait to be sent"):
                idle.send(Join(request=MAX_IN_FLIGHT + 1, rows=1))
        idle.waker.close()


def test_a_session_that_never_speaks_is_ended(job: Job, tmp_path: Path) -> None:
    """As whoever replays a greeting: it gets an answer that it cannot open, and no more."""
    with serving(job, tmp_path, ["a"]) as running:
        with running.link("a"):
            service = running.running.service
            assert service is not None
            service.settings = service.settings.model_copy(update={"silent_session_s": 0.05})
        with BrokerConnection(running.context, Door(CLIENTS), hello("client")) as connection:
            connection.open(WAIT_S)
            server = key_digest(running.server.public)
            header = Open(version=PROTOCOL_VERSION, session=b"s" * 16, server=server, job=job.digest())
            greeting = ClientHandshake(running.clients["a"].private, running.server.public, header).message_1
            connection.send(pack(header, [greeting]))
            last = connection.receive(0.0)
            while (last is None or not isinstance(last.header, Close)) and connection.socket.poll(int(WAIT_S * 1000)):
                last = connection.receive(0.0) or last
    assert last is not None
    assert isinstance(last.header, Close)
    assert last.header.code == "silent"
