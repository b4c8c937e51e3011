"""The trunk as the client sees it: hidden states go in and come out, gradients go back. Tensors here, bytes below."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from shared.error_feedback import Compressed
from shared.errors import SchemaError
from shared.job import Job
from shared.payload.messages import (
    CONTROL,
    RESIDUAL,
    Backward,
    Finished,
    Forward,
    Generate,
    Gradient,
    Hidden,
    Join,
    Mask,
    Masking,
    Message,
    Release,
    RoundStart,
    Sealed,
    SumOf,
    Update,
)
from shared.payload.pieces import Piece
from shared.payload.tensors import decode, encode
from shared.prefixes import under
from shared.secure_aggregation.messages import GroupSum
from shared.wire.envelope import Frame
from worker_client.batches import Batch
from worker_client.link import Answer, Link

Due = TypeVar("Due")
HOW_TO_WAIT = "run the same command to resume; --wait SECONDS waits longer"


@dataclass(frozen=True)
class Boundary:
    """Between rounds: the round to train next, or None when the job is finished, and the averages of head and tail.

    `control`: the server's control variates (SCAFFOLD), `residuals`: by module, what is added to frozen weights
    (FedEx-LoRA), if there are any yet. `refused`: why the update of the round before did not count, if so. `counted`:
    how many rounds were complete when an update of this client last did, None if the server cannot say. `sum`: among
    whom updates are masked, if they are. `pieces` with their `frames`: in place of averages, part of their difference
    to what the round before began with. `sealed` with its `box`: in place of averages, under a group's key.
    """

    round: int | None
    members: int
    averages: dict[str, Tensor]
    control: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    refused: str | None = None
    counted: int | None = None
    sum: SumOf | None = None
    pieces: tuple[Piece, ...] = ()
    frames: Sequence[Frame] = ()
    sealed: Sealed | None = None
    box: Frame = field(default=b"", repr=False)


@dataclass(frozen=True)
class GroupWords:
    """A sum under a group's key, which this client is asked to open; the words in one frame."""

    message: GroupSum
    frame: Frame = field(repr=False)


@dataclass(frozen=True)
class Pending:
    """A request under way: its number, the shape of the tensor that answers it, and where the answer arrives."""

    request: int
    shape: tuple[int, ...]
    answer: "Future[Answer]"


@dataclass(frozen=True)
class RemoteTrunk:
    """Calls wait for their answers, `timeout_s` at most (a cohort waits for its slowest member); for a round to begin,
    and to end, `wait_s` if it is given.

    Where rounds are of some clients only (cohort.sampled), that is how long a round may take, and a client may not be
    drawn before the last: it waits for all of them.
    """

    link: Link
    job: Job
    timeout_s: float
    wait_s: float | None = field(default=None, kw_only=True)

    @property
    def round_timeout_s(self) -> float:
        """How long a client waits for its next round."""
        wait_s = self.timeout_s if self.wait_s is None else self.wait_s
        return wait_s * (1 if self.job.cohort.sampled is None else self.job.rounds.count)

    def join(self, rows: int) -> Boundary:
        """Waits until the next round begins, and so for the other members. Raises DeadlineExceeded."""
        return self._boundary(Join(request=self.link.next_request(), rows=rows), [])

    def update(self, round: int, weight: int, values: Mapping[str, Tensor]) -> Boundary:
        """Hand in what was trained in `round`, for the average."""
        encoded = [encode(name, value, "float32") for name, value in values.items()]
        message = Update(
            request=self.link.next_request(),
            round=round,
            weight=max(1, weight),
            tensors=tuple(info for info, _ in encoded),
        )
        return self._boundary(message, [frame for _, frame in encoded])

    def update_in_part(self, round: int, weight: int, difference: Compressed) -> Boundary:
        """Hand in part of the difference to the start of `round`."""
        request = self.link.next_request()
        message = Update(request=request, round=round, weight=max(1, weight), pieces=difference.pieces)
        return self._boundary(message, difference.frames)

    def mask(
        self, round: int, body: Message, due: type[Due], frames: Sequence[Frame] = (), *, weight: int = 0
    ) -> "Due | Boundary":
        """A step of the round's masked sum, in place of `update`; the answer, which is `due` or ends the round.

        `weight`: that of this client's own adapter in the trunk, in the first step.
        """
        message = Mask(request=self.link.next_request(), round=round, weight=weight, body=body)  # type: ignore[arg-type]
        answer = self._of_round(message, frames)
        if not isinstance(answer.message, Masking):
            return self._read_boundary(answer)
        step = answer.message.body
        reply = GroupWords(step, answer.frames[0]) if isinstance(step, GroupSum) else step
        if not isinstance(reply, due):
            raise SchemaError(f"the server answered with {step.type}, out of turn")
        return reply

    def send_forward(
        self,
        hidden: Tensor,
        batch: Batch,
        *,
        round: int,
        step: int,
        micro_batch: int,
        target_tokens: int,
        wants_gradient: bool,
    ) -> Pending:
        """A training batch's hidden states (T, d); `target_tokens` of its whole step. Does not wait."""
        return self._send_forward(
            hidden,
            batch,
            purpose="train",
            round=round,
            step=step,
            micro_batch=micro_batch,
            target_tokens=target_tokens,
            wants_gradient=wants_gradient,
        )

    def evaluate(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The trunk's output (T, d), without effect on anything."""
        targets = batch.target_tokens
        return self.hidden(
            self._send_forward(hidden, batch, purpose="evaluate", target_tokens=targets, wants_gradient=False)
        )

    def generate(self, hidden: Tensor, lengths: Sequence[int], stream: int) -> Tensor:
        """The trunk's output (T, d) for rows that go on from what the server keeps of `stream`."""
        info, frame = encode("hidden", hidden, self.job.wire.hidden)
        message = Generate(request=self.link.next_request(), stream=stream, lengths=tuple(lengths), tensors=(info,))
        return self.hidden(Pending(message.request, tuple(hidden.shape), self.link.send(message, [frame])))

    def release(self, stream: int) -> None:
        """Let the server forget the stream."""
        self.link.tell(Release(stream=stream))

    def hidden(self, pending: Pending) -> Tensor:
        """The trunk's output (T, d), float32, for a forward."""
        answer = self.link.wait(pending.answer, self.timeout_s, "no answer to a forward request")
        reply = _expect(answer, Hidden)
        if len(reply.tensors) != 1:
            raise SchemaError("the server answered without hidden states")
        return decode(reply.tensors[0], answer.frames[0], shape=pending.shape, dtype=self.job.wire.hidden)

    def send_backward(self, forward: int, gradient: Tensor) -> Pending:
        """The gradient at the tail's input (T, d) for the forward of that number. Does not wait."""
        info, frame = encode("gradient", gradient, self.job.wire.gradient)
        message = Backward(request=self.link.next_request(), forward=forward, tensors=(info,))
        return Pending(message.request, tuple(gradient.shape), self.link.send(message, [frame]))

    def gradient(self, pending: Pending) -> Tensor | None:
        """The gradient at the head's output (T, d) for a backward, or None if none was wanted."""
        answer = self.link.wait(pending.answer, self.timeout_s, "no answer to a backward request")
        reply = _expect(answer, Gradient)
        if not reply.tensors:
            return None
        return decode(reply.tensors[0], answer.frames[0], shape=pending.shape, dtype=self.job.wire.gradient)

    def _send_forward(self, hidden: Tensor, batch: Batch, **settings: Any) -> Pending:
        info, frame = encode("hidden", hidden, self.job.wire.hidden)
        message = Forward(request=self.link.next_request(), lengths=batch.lengths, tensors=(info,), **settings)
        return Pending(message.request, tuple(hidden.shape), self.link.send(message, [frame]))

    def _boundary(self, message: Join | Update, frames: Sequence[Frame]) -> Boundary:
        return self._read_boundary(self._of_round(message, frames))

    def _read_boundary(self, answer: Answer) -> Boundary:
        reply = _expect(answer, RoundStart, Finished)
        tensors = {
            info.name: decode(info, frame, dtype="float32")
            for info, frame in zip(reply.tensors, answer.frames, strict=False)
        }
        rest = answer.frames[len(reply.tensors) :]
        box = b"" if reply.sealed is None else rest[-1]
        control, residuals = (under(prefix, tensors) for prefix in (CONTROL, RESIDUAL))
        averages = {name: value for name, value in tensors.items() if not name.startswith((CONTROL, RESIDUAL))}
        finished = isinstance(reply, Finished)
        if not finished and reply.round >= self.job.rounds.count:
            raise SchemaError(f"the server begins round {reply.round + 1} of {self.job.rounds.count} (rounds.count)")
        round, members, sum = (None, 0, None) if finished else (reply.round, reply.members, reply.sum)
        told = averages, control, residuals, reply.refused, reply.counted, sum
        return Boundary(round, members, *told, reply.pieces, rest[: len(reply.pieces)], reply.sealed, box)

    def _of_round(self, message: Join | Update | Mask, frames: Sequence[Frame]) -> Answer:
        """The answer to what the server answers when the other members have done their part too."""
        what = f"no round began: the job waits for its other members (cohort.clients={self.job.cohort.clients})"
        if not isinstance(message, Join):
            what = f"round {message.round + 1} has not ended: it waits for its other members"
        return self.link.wait(self.link.send(message, frames), self.round_timeout_s, what, HOW_TO_WAIT)


def _expect(answer: Answer, *kinds: type) -> Any:
    if not isinstance(answer.message, kinds):
        raise SchemaError(f"the server answered with a {answer.message.type} message")
    return answer.message
