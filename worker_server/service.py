"""The server's socket thread: it greets, opens, checks, hands work to the compute thread, and seals the answers."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from enum import Enum

import zmq
from torch import Tensor

from shared.errors import ConnectionFailed, FlglmError, PeerError, Refused
from shared.logs import event
from shared.payload.messages import (
    Backward,
    Confirm,
    Finished,
    Forward,
    FromClient,
    Generate,
    Gradient,
    Hidden,
    Join,
    Leave,
    Message,
    Refusal,
    Release,
    RoundStart,
    Update,
    Welcome,
)
from shared.payload.tensors import encode
from shared.wire.connection import BrokerConnection
from shared.wire.envelope import MAX_REASON_CHARS, Close, Data, Envelope, Frame, Open, pack
from shared.wire.waker import Waker
from worker_server.engine import Computed, Engine
from worker_server.inference import Inference
from worker_server.intake import Intake
from worker_server.replicas import Replicas
from worker_server.rounds import Rounds
from worker_server.sessions import Session, Sessions, code_of
from worker_server.settings import ServerSettings
from worker_server.streams import StreamBook
from worker_server.work import (
    Aggregate,
    Finish,
    Instruction,
    Refuse,
    ReleaseStreams,
    Restore,
    RunBackward,
    RunEvaluation,
    RunForward,
    RunGeneration,
    StartRound,
    Ticket,
)

POLL_S = 0.5
STOP_S = 600.0

logger = logging.getLogger(__name__)


class State(Enum):
    RUNNING = "running"
    STOPPING = "stopping"


class Service:
    """Everything is handed in made; `run()` serves until the job is finished and its clients have left, or `stop()`."""

    def __init__(
        self,
        settings: ServerSettings,
        sessions: Sessions,
        intake: Intake,
        rounds: Rounds,
        inference: Inference,
        streams: StreamBook,
        engine: Engine,
        connection: BrokerConnection,
        waker: Waker,
        welcome: Welcome,
        replicas: Replicas | None = None,
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.intake = intake
        self.rounds = rounds
        self.inference = inference
        self.streams = streams
        self.engine = engine
        self.connection = connection
        self.waker = waker
        self.welcome = welcome
        self.replicas = replicas
        self.state = State.RUNNING
        self.counters: Counter[str] = Counter()
        self.finished_at: float | None = None

    def stop(self) -> None:
        """From any thread or a signal handler: finish the work at hand and return from `run()`."""
        self.state = State.STOPPING
        self.waker.wake()

    def run(self) -> None:
        """Raises ConnectionFailed if the broker is not there or falls silent, and what the compute thread raised."""
        self.connection.open(self.settings.connect_timeout_s, lambda: self.state is State.STOPPING)
        event(logger, "server_ready", broker=self.connection.address, round=self.rounds.round)
        self.engine.start()
        poller = zmq.Poller()
        poller.register(self.connection.socket, zmq.POLLIN)
        poller.register(self.waker.reader, zmq.POLLIN)
        try:
            while self.state is State.RUNNING and not self._all_done(time.monotonic()):
                poller.poll(self._poll_ms(time.monotonic()))
                self.waker.drain()
                self._turn(time.monotonic())
        finally:
            self._farewell()
            self.engine.stop(STOP_S)

    def _turn(self, now: float) -> None:
        while (envelope := self.connection.receive(now)) is not None:
            self._receive(envelope, now)
        for outcome in self.engine.collect():
            self._deliver(outcome, now)
        self._carry_out(self.rounds.tick(now))
        if self.replicas is not None:
            self._heed(self.replicas)
        for session in self.sessions.silent(now - self.settings.silent_session_s):
            self._end(session.id, "silent", "no record came after the handshake", now)
        self.connection.tick(now)

    def _poll_ms(self, now: float) -> int:
        deadline = self.rounds.deadline()
        wait = POLL_S if deadline is None else min(POLL_S, max(0.0, deadline - now))
        return int(wait * 1000) + 1

    def _heed(self, replicas: Replicas) -> None:
        """What the other replicas have noted, and what this one has to note."""
        rounds = self.rounds
        if rounds.held and rounds.has_its_clients:
            replicas.announce_clients()
            if replicas.all_have_clients():
                self._carry_out(rounds.all_have_their_clients())
        if rounds.stage == "waiting" and replicas.ending(rounds.round):
            self._carry_out(rounds.ended_elsewhere())

    def _all_done(self, now: float) -> bool:
        """The job is finished and every client has left, or has had its time to."""
        if self.rounds.stage != "finished":
            return False
        if self.finished_at is None:
            self.finished_at = now
        nobody_left = self.counters["sessions_closed"] > 0 and not list(self.sessions)
        return nobody_left or now - self.finished_at > self.settings.farewell_s

    # What arrives

    def _receive(self, envelope: Envelope, now: float) -> None:
        header = envelope.header
        if isinstance(header, Open):
            self._open(envelope, header, now)
        elif isinstance(header, Data):
            self._record(envelope, header, now)
        elif isinstance(header, Close):
            if header.session is None:
                raise ConnectionFailed(f"the broker ended the connection: {header.message}")
            self._left(header.session, header.code, now)

    def _open(self, envelope: Envelope, header: Open, now: float) -> None:
        try:
            session, accept = self.sessions.open(envelope, now)
        except FlglmError as error:
            self._count_refusal(error, header.session)
            self._close(header.session, code_of(error), error.message)
            return
        self.counters["sessions_opened"] += 1
        event(logger, "session_opened", session=session.id, client=session.client)
        self.connection.send(accept)
        self._send(session, self.welcome)

    def _record(self, envelope: Envelope, header: Data, now: float) -> None:
        session = self.sessions.get(header.session)
        if session is None:
            self._close(header.session, "unknown_session", "the server knows no such session: open a new one")
            return
        request: int | None = None
        try:
            _, message, frames = self.sessions.read(envelope)
            request = getattr(message, "request", None)
            self._carry_out(self._handle(session, message, frames, now))
        except (PeerError, Refused) as error:
            self._count_refusal(error, session.id)
            self._send(session, Refusal(request=request, code=code_of(error), message=error.message[:500]))

    def _handle(self, session: Session, message: FromClient, frames: Sequence[Frame], now: float) -> list[Instruction]:
        match message:
            case Confirm():
                return []
            case Join():
                self._supersede(session, now)
                event(logger, "client_joined", session=session.id, client=session.client, rows=message.rows)
                return self.rounds.joined(self.intake.join(session, message), now)
            case Forward(purpose="train"):
                ticket = self.intake.forward(session, message, frames)
                return self.rounds.forward(ticket, message.round, message.step, message.micro_batch, now)
            case Forward():
                return self.inference.evaluate(self.intake.forward(session, message, frames))
            case Generate():
                ticket = self.intake.generate(session, message, frames)
                self.streams.extend(session.id, message.stream, message.lengths)
                return self.inference.generate(ticket)
            case Release():
                return self.inference.release(self.streams.release(session.id, message.stream))
            case Backward():
                return self.rounds.backward(self.intake.backward(session, message, frames), now)
            case Update():
                return self.rounds.update(self.intake.update(session, message, frames), message.round, now)
            case Leave():
                self._left(session.id, "left", now)
                return []

    def _supersede(self, session: Session, now: float) -> None:
        """End older sessions of this client: it was killed and is back before the broker has missed it."""
        for other in self.sessions:
            if other.client == session.client and other.id != session.id:
                self._end(other.id, "superseded", "this client has joined with another session", now)

    def _left(self, session_id: bytes, code: str, now: float) -> None:
        session = self.sessions.close(session_id)
        if session is None:
            return
        self.counters["sessions_closed"] += 1
        event(logger, "session_closed", session=session_id, client=session.client, code=code)
        self.inference.left(session_id)
        self._carry_out(self.inference.release(self.streams.left(session_id)))
        self._carry_out(self.rounds.left(session_id, now))

    def _end(self, session_id: bytes, code: str, message: str, now: float) -> None:
        self._close(session_id, code, message)
        self._left(session_id, code, now)

    # What is done about it

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case StartRound(round_, answers):
                    event(logger, "round_started", round=round_, clients=len(answers))
                    self._send_averages(answers, round_)
                case Finish(answers):
                    event(logger, "job_finished", rounds=self.rounds.round)
                    self._send_averages(answers, None)
                case Refuse(session_id, request, code, text):
                    session = self.sessions.get(session_id)
                    self.counters[f"refused_{code}"] += 1
                    if session is not None:
                        self._send(session, Refusal(request=request, code=code, message=text))
                case Restore(round_):
                    event(logger, "round_undone", round=round_)
                    self.engine.submit(instruction)
                case _:
                    self.engine.submit(instruction)

    def _deliver(self, outcome: Computed, now: float) -> None:
        for ticket, tensor in outcome.answers:
            session = self.sessions.get(ticket.session)
            if session is not None:
                self._answer(session, outcome, ticket, tensor)
        match outcome.work:
            case RunForward():
                self._carry_out(self.rounds.forward_done(outcome.work.cohort, now))
            case RunBackward():
                self._log_step()
                self._carry_out(self.rounds.backward_done(outcome.work.cohort, now))
            case RunGeneration():
                for ticket, _ in outcome.answers:
                    self._carry_out(self.inference.release(self.streams.answered(ticket.session, ticket.stream)))
                self._carry_out(self.inference.done())
            case RunEvaluation() | ReleaseStreams():
                self._carry_out(self.inference.done())
            case Aggregate():
                self._carry_out(self.rounds.aggregation_done())
            case Restore():
                pass

    def _answer(self, session: Session, outcome: Computed, ticket: Ticket, tensor: Tensor | None) -> None:
        wire = self.intake.job.wire
        if isinstance(outcome.work, RunBackward):
            encoded = [] if tensor is None else [encode("gradient", tensor, wire.gradient)]
            answer: Message = Gradient(request=ticket.request, tensors=tuple(info for info, _ in encoded))
        else:
            assert tensor is not None
            encoded = [encode("hidden", tensor, wire.hidden)]
            answer = Hidden(request=ticket.request, tensors=(encoded[0][0],))
        self._send(session, answer, [frame for _, frame in encoded])

    def _send_averages(self, answers: Sequence[Ticket], round_: int | None) -> None:
        """RoundStart for `round_`, or Finished, with the latest averages, to those who wait for it."""
        averages = self.engine.progress.averages or {}
        encoded = [encode(name, tensor, "float32") for name, tensor in averages.items()]
        infos = tuple(info for info, _ in encoded)
        for ticket in answers:
            session = self.sessions.get(ticket.session)
            if session is None:
                continue
            answer: Message
            if round_ is None:
                answer = Finished(request=ticket.request, rounds=self.rounds.round, tensors=infos)
            else:
                answer = RoundStart(request=ticket.request, round=round_, members=len(answers), tensors=infos)
            self._send(session, answer, [frame for _, frame in encoded])

    def _send(self, session: Session, message: Message, tensors: Sequence[Frame] = ()) -> None:
        self.connection.send(session.seal(message, tensors))

    def _close(self, session_id: bytes | None, code: str, message: str) -> None:
        self.connection.send(pack(Close(session=session_id, code=code, message=message[:MAX_REASON_CHARS])))

    def _farewell(self) -> None:
        for session in self.sessions:
            self._close(session.id, "server_stopping", "the server stops; it resumes from its last round")
        self.connection.close_politely()

    def _log_step(self) -> None:
        self.counters["steps"] += 1
        event(logger, "step_done", level=logging.DEBUG, round=self.rounds.round, steps=self.counters["steps"])

    def _count_refusal(self, error: FlglmError, session: bytes) -> None:
        self.counters[f"refused_{code_of(error)}"] += 1
        event(
            logger, "message_refused", level=logging.WARNING, session=session, code=code_of(error), reason=error.message
        )
