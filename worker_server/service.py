"""The server's socket thread: it greets, opens, checks, hands work to the compute thread, and seals the answers."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Any

import zmq
from torch import Tensor

from shared.errors import ConnectionFailed, FlglmError, PeerError, Refused, TensorError
from shared.logs import event
from shared.monitoring import Health
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
    Mask,
    Masking,
    Message,
    Refusal,
    Release,
    RoundStart,
    Sealed,
    SumOf,
    Update,
    Welcome,
)
from shared.payload.tensors import encode
from shared.wire.connection import BrokerConnection
from shared.wire.envelope import MAX_REASON_CHARS, Close, Data, Envelope, Frame, Open
from shared.wire.envelope import pack as pack_envelope
from shared.wire.waker import Waker
from worker_server.brokers import Brokers
from worker_server.cohort_metrics import CohortMetrics
from worker_server.engine import Computed, Engine
from worker_server.inference import Inference
from worker_server.intake import Intake
from worker_server.masking import RoundSum
from worker_server.replicas import Replicas
from worker_server.rounds import Rounds
from worker_server.sessions import Session, Sessions, code_of
from worker_server.settings import ServerSettings
from worker_server.streams import StreamBook
from worker_server.work import (
    Aggregate,
    Bind,
    Dismiss,
    Finish,
    Instruction,
    Refuse,
    Relay,
    ReleaseStreams,
    Restore,
    RunBackward,
    RunEvaluation,
    RunForward,
    RunGeneration,
    StartRound,
    SumFailed,
    Ticket,
    Work,
)

POLL_S = 0.25
STOP_S = 600.0
# How often the allow list is looked at: whoever is revoked is out after this long.
ADMISSIONS_S = 0.25
# What a broker says to a server that it will not serve, however often it asks.
FINAL = ("version", "wrong_side", "too_many_peers", "not_admitted", "revoked")
# What forwards are for, in metrics.
PURPOSES: dict[type[Work], str] = {RunForward: "train", RunEvaluation: "evaluate", RunGeneration: "generate"}
DISMISSED = "round_undone", "the round lost more members than cohort.quorum allows, and begins anew"
DISMISSED_LATE = "timed_out", "the round goes on without this client, which the others waited for in vain"

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
        brokers: Brokers,
        waker: Waker,
        welcome: Welcome,
        metrics: CohortMetrics,
        health: Health,
        replicas: Replicas | None = None,
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.intake = intake
        self.rounds = rounds
        self.inference = inference
        self.streams = streams
        self.engine = engine
        self.brokers = brokers
        self.waker = waker
        self.welcome = welcome
        self.metrics = metrics
        self.health = health
        self.replicas = replicas
        self.state = State.RUNNING
        self.counters: Counter[str] = Counter()
        self.finished_at: float | None = None
        self.next_look = 0.0
        self.stranded: set[bytes] = set()
        # Members of the last round that have not yet taken its result: they may have been killed, and come back.
        self.owed: set[str] = set()
        # When the clients of a job that was resumed, or of a round that was undone, have had their time to come back.
        self.back_by = 0.0
        # Those for whom a round waits, as the log has it.
        self.awaited: list[str] = []

    def stop(self) -> None:
        """From any thread or a signal handler: finish the work at hand and return from `run()`."""
        self.state = State.STOPPING
        self.waker.wake()

    def run(self) -> None:
        """Raises ConnectionFailed if no broker is there (any more), and what the compute thread raised.

        Work at hand is finished before it returns; if that was the end of a round, its checkpoint is written.
        """
        self.brokers.open(self.settings.connect_timeout_s, lambda: self.state is State.STOPPING)
        event(logger, "server_ready", brokers=self.brokers.addresses, rounds=self.rounds.round)
        self.engine.start()
        self.back_by = time.monotonic() + self.rounds.plan.deadline_s
        poller = zmq.Poller()
        for connection in self.brokers.connections:
            poller.register(connection.socket, zmq.POLLIN)
        poller.register(self.waker.reader, zmq.POLLIN)
        try:
            while self.state is State.RUNNING and not self._all_done(time.monotonic()):
                self.health.beat(time.monotonic())
                self.health.ready = any(connection.up for connection in self.brokers.connections)
                poller.poll(self._poll_ms(time.monotonic()))
                self.waker.drain()
                self._turn(time.monotonic())
        finally:
            self.health.ready = False
            self._farewell()
            self.engine.stop(STOP_S)
        self.engine.collect()  # raises what went wrong in the last of its work

    def _turn(self, now: float) -> None:
        for connection, envelope in self.brokers.receive(now):
            self._receive(connection, envelope, now)
        for outcome in self.engine.collect():
            self._deliver(outcome, now)
        self._carry_out(self.rounds.tick(now))
        if now > self.back_by:
            self._carry_out(self.rounds.wait_no_longer())
        if self.replicas is not None:
            self._heed(self.replicas)
        for session in self.sessions.silent(now - self.settings.silent_session_s):
            self._end(session.id, "silent", "no record came after the handshake", now)
        self._part_with([*self.brokers.tick(now), *self.stranded], now)
        self.stranded.clear()
        if now >= self.next_look:
            self._put_out_the_revoked(now)
            self.next_look = now + ADMISSIONS_S

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
        """The job is finished and every client has left, or has had its time to; nobody is to be served any more."""
        if self.rounds.stage != "finished" or self.settings.keep_serving:
            return False
        if self.finished_at is None:
            self.finished_at = now
        nobody_left = self.counters["clients_left"] > 0 and not list(self.sessions)
        return (nobody_left and not self.owed) or now - self.finished_at > self.settings.farewell_s

    # What arrives

    def _receive(self, connection: BrokerConnection, envelope: Envelope, now: float) -> None:
        header = envelope.header
        if isinstance(header, Open):
            self._open(connection, envelope, header, now)
        elif isinstance(header, Data):
            self._record(connection, envelope, header, now)
        elif isinstance(header, Close):
            if header.session is None:
                if header.code in FINAL:
                    raise ConnectionFailed(f"the broker at {connection.address} refused: {header.message}")
                self._part_with(self.brokers.down(connection, header.code), now)
            elif self.brokers.routes.get(header.session) is connection:
                self._left(header.session, header.code, now)

    def _open(self, connection: BrokerConnection, envelope: Envelope, header: Open, now: float) -> None:
        try:
            session, accept = self.sessions.open(envelope, now)
        except FlglmError as error:
            self._count_refusal(error, header.session)
            connection.send(_closing(header.session, code_of(error), error.message))
            return
        self.brokers.routes[session.id] = connection
        event(logger, "session_opened", session=session.id, client=session.client)
        self.brokers.send(accept)
        self._send(session, self.welcome)

    def _record(self, connection: BrokerConnection, envelope: Envelope, header: Data, now: float) -> None:
        session = self.sessions.get(header.session)
        if session is None or self.brokers.routes.get(session.id) is not connection:
            text = "the server knows no such session: open a new one"
            connection.send(_closing(header.session, "unknown_session", text))
            return
        request: int | None = None
        try:
            _, message, frames = self.sessions.read(envelope)
            request = getattr(message, "request", None)
            instructions = self._handle(session, message, frames, now)
            if isinstance(message, Forward | Backward | Generate):
                session.unanswered[message.request] = now
            self._carry_out(instructions)
        except (PeerError, Refused) as error:
            self._count_refusal(error, session.id)
            self._send(session, Refusal(request=request, code=code_of(error), message=error.message[:500]))

    def _handle(self, session: Session, message: FromClient, frames: Sequence[Frame], now: float) -> list[Instruction]:
        match message:
            case Confirm():
                return []
            case Join():
                self._supersede(session, now)
                session.joined = True
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
                return self.rounds.update(self._update(session, message, frames), message.round, now)
            case Mask():
                return self.rounds.mask(self.intake.mask(session, message), message, frames, now)
            case Leave():
                self._left(session.id, "left", now)
                return []

    def _update(self, session: Session, message: Update, frames: Sequence[Frame]) -> Ticket:
        """The update, or a ticket that says why it does not count."""
        try:
            return self.intake.update(session, message, frames)
        except (TensorError, Refused) as error:
            self._count_refusal(error, session.id)
            reason = error.message[:MAX_REASON_CHARS]
            return Ticket(session.id, session.client, message.request, None, refused=reason, held=message.round)

    def _supersede(self, session: Session, now: float) -> None:
        """End older sessions of this client: it was killed and is back before the broker has missed it."""
        for other in self.sessions:
            if other.client == session.client and other.id != session.id:
                self._end(other.id, "superseded", "this client has joined with another session", now)

    def _left(self, session_id: bytes, code: str, now: float) -> None:
        session = self.sessions.close(session_id)
        if session is None:
            return
        self.brokers.routes.pop(session_id, None)
        self.counters["clients_left"] += session.joined
        if code == "left" and session.joined and self.rounds.stage == "finished":
            self.owed.discard(session.client)
        event(logger, "session_closed", session=session_id, client=session.client, code=code)
        self.inference.left(session_id)
        self._carry_out(self.inference.release(self.streams.left(session_id)))
        self._carry_out(self.rounds.left(session_id, now))

    def _end(self, session_id: bytes, code: str, message: str, now: float) -> None:
        self.brokers.send(_closing(session_id, code, message))
        self._left(session_id, code, now)

    def _part_with(self, sessions: Sequence[bytes], now: float) -> None:
        """Their broker is away, and with it their way here."""
        for session_id in sessions:
            self._left(session_id, "broker_gone", now)

    def _put_out_the_revoked(self, now: float) -> None:
        for session in self.sessions.revoked():
            self._end(session.id, "revoked", "the admission was taken back", now)
        if (names := self.sessions.names()) is not None:
            self._carry_out(self.rounds.only(names))
        if (awaited := self.rounds.awaited) != self.awaited:
            self.awaited = awaited
            if awaited:
                event(logger, "round_waits", level=logging.WARNING, round=self.rounds.round, clients=",".join(awaited))

    # What is done about it

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case StartRound(round_, answers, sum_):
                    event(logger, "round_started", round=round_, clients=len(answers))
                    self._send_averages(answers, round_, sum_)
                case Relay(answered, frames):
                    for ticket, body in answered:
                        session = self.sessions.get(ticket.session)
                        if session is not None:
                            self._send(session, Masking(request=ticket.request, body=body), frames)
                case Bind(round_, clients):
                    self.engine.progress.bind(round_, clients)
                case SumFailed(round_, reason, barred):
                    self.counters["sums_failed"] += 1
                    names = ",".join(barred)
                    event(logger, "sum_failed", level=logging.WARNING, round=round_, reason=reason, barred=names)
                case Finish(answers):
                    if self.finished_at is None:
                        self.owed = set(self.rounds.last_members)
                    event(logger, "job_finished", rounds=self.rounds.round)
                    self._send_averages(answers, None)
                case Refuse(session_id, request, code, text):
                    session = self.sessions.get(session_id)
                    self.counters[f"refused_{code}"] += 1
                    if session is not None:
                        session.unanswered.pop(request, None)
                        self._send(session, Refusal(request=request, code=code, message=text))
                case Restore(round_):
                    event(logger, "round_undone", round=round_)
                    self.engine.submit(instruction)
                case Dismiss(sessions, late):
                    code, text = DISMISSED_LATE if late else DISMISSED
                    self.back_by = time.monotonic() + self.rounds.plan.deadline_s
                    for session_id in sessions:
                        self._end(session_id, code, text, time.monotonic())
                case _:
                    self.engine.submit(instruction)

    def _deliver(self, outcome: Computed, now: float) -> None:
        if isinstance(outcome.work, RunForward | RunEvaluation | RunGeneration):
            self.metrics.forward(PURPOSES[type(outcome.work)], [ticket.tokens for ticket in outcome.work.tickets])
        waits = []
        for ticket, tensor in outcome.answers:
            session = self.sessions.get(ticket.session)
            if session is not None:
                waits.append(outcome.began - session.unanswered.pop(ticket.request, outcome.began))
                self._answer(session, outcome, ticket, tensor)
        self.metrics.computed(waits, outcome.ended - outcome.began)
        self.counters["updates_bounded"] += outcome.bounded
        self.counters["wrong_shares"] += outcome.liars
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
            case Aggregate(sum=RoundSum(to_open=True)):
                self._carry_out(self.rounds.uncovered(now))
            case Aggregate():
                self._carry_out(self.rounds.aggregation_done(outcome.failure))
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

    def _send_averages(self, answers: Sequence[Ticket], round_: int | None, sum_: SumOf | None = None) -> None:
        """RoundStart for `round_`, or Finished, with the latest averages, to those who wait for it.

        Those who still hold what the last round began with get the difference, where that is what travels.
        """
        progress = self.engine.progress
        encoded = [encode(name, tensor, "float32") for name, tensor in progress.for_clients().items()]
        infos, change = tuple(info for info, _ in encoded), progress.change
        whole: list[Frame] = [frame for _, frame in encoded]
        sealed = None
        if progress.box is not None:
            sealed, whole = Sealed(round=progress.box.round), [*whole, progress.box.frame]
        for ticket in answers:
            session = self.sessions.get(ticket.session)
            if session is None:
                continue
            told: dict[str, Any] = {"request": ticket.request, "refused": ticket.refused, "sealed": sealed}
            if self.replicas is None:  # a client may have been at another in between, which this one does not know of
                told["counted"] = progress.counted.get(ticket.client, 0)
            holds = change is not None and ticket.held == progress.round - 1
            told |= {"pieces": change.pieces} if change is not None and holds else {"tensors": infos}
            answer: Message
            if round_ is None:
                answer = Finished(rounds=self.rounds.round, **told)
            else:
                answer = RoundStart(round=round_, members=len(answers), sum=sum_, **told)
            self._send(session, answer, change.frames if change is not None and holds else whole)

    def _send(self, session: Session, message: Message, tensors: Sequence[Frame] = ()) -> None:
        """A session whose broker takes no more is over: what it misses cannot be made up for."""
        if not self.brokers.send(session.seal(message, tensors)):
            self.stranded.add(session.id)

    def _farewell(self) -> None:
        for session in self.sessions:
            text = "the server stops; it resumes from its last round"
            self.brokers.send(_closing(session.id, "server_stopping", text))
        self.brokers.close_politely()

    def _log_step(self) -> None:
        self.counters["steps"] += 1
        event(logger, "step_done", level=logging.DEBUG, round=self.rounds.round, steps=self.counters["steps"])

    def _count_refusal(self, error: FlglmError, session: bytes) -> None:
        self.counters[f"refused_{code_of(error)}"] += 1
        event(
            logger, "message_refused", level=logging.WARNING, session=session, code=code_of(error), reason=error.message
        )


def _closing(session_id: bytes, code: str, message: str) -> Envelope:
    return pack_envelope(Close(session=session_id, code=code, message=message[:MAX_REASON_CHARS]))
