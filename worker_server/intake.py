"""From a client's message to a checked ticket: every size, dtype and budget is looked at before anything queues."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shared.error_feedback import decompress
from shared.errors import Refused, TensorError
from shared.job import Job
from shared.masked_updates import most_tokens
from shared.payload.messages import Backward, Forward, Generate, Join, Mask, Update
from shared.payload.tensors import TensorInfo, decode
from shared.secure_aggregation.messages import AdvertiseKeys, RingInput
from shared.wire.envelope import Frame
from worker_server.kept import Rows
from worker_server.sessions import Session
from worker_server.work import Ticket


@dataclass(frozen=True)
class Intake:
    """`width` is the model's hidden size d; `update_shapes` what every Update must hold, by name."""

    job: Job
    width: int
    update_shapes: Mapping[str, tuple[int, ...]]

    def join(self, session: Session, message: Join) -> Ticket:
        return Ticket(session.id, session.client, message.request, None, public=session.public)

    def forward(self, session: Session, message: Forward, frames: Sequence[Frame]) -> Ticket:
        """Raises TensorError or Refused."""
        tokens = self._tokens(message)
        row, longest = max(message.lengths), self.job.data.max_length
        if row > longest:
            raise Refused(f"a row of {row} tokens; the longest is {longest}", reason="too_long")
        most = tokens
        if message.purpose == "train":
            most += (self.job.training.gradient_accumulation_steps - 1) * self.job.cohort.max_batch_tokens
        if message.target_tokens > most:
            raise Refused(f"{message.target_tokens} target tokens among {tokens}", reason="target_tokens")
        hidden = self._hidden(message, frames)
        rows = Rows(hidden, message.lengths, message.target_tokens, message.wants_gradient, session.client)
        return Ticket(session.id, session.client, message.request, rows, tokens, message.target_tokens)

    def generate(self, session: Session, message: Generate, frames: Sequence[Frame]) -> Ticket:
        """Raises TensorError or Refused. How long a stream may become is the StreamBook's affair."""
        tokens = self._tokens(message)
        rows = Rows(self._hidden(message, frames), message.lengths, 0, False, session.client)
        return Ticket(session.id, session.client, message.request, rows, tokens, stream=message.stream)

    def _tokens(self, message: Forward | Generate) -> int:
        if self.job.split.trunk == "client":
            raise Refused("the clients of this job hold the trunk themselves (split.trunk)", reason="no_trunk")
        tokens = sum(message.lengths)
        if tokens > self.job.cohort.max_batch_tokens:
            raise Refused(
                f"{tokens} tokens at once; cohort.max_batch_tokens is {self.job.cohort.max_batch_tokens}",
                reason="too_many_tokens",
            )
        return tokens

    def _hidden(self, message: Forward | Generate, frames: Sequence[Frame]) -> Tensor:
        info = _only(message.tensors)
        return decode(info, frames[0], shape=(sum(message.lengths), self.width), dtype=self.job.wire.hidden)

    def backward(self, session: Session, message: Backward, frames: Sequence[Frame]) -> Ticket:
        """Raises TensorError. Lockstep checks that the rows are those of the Forward."""
        info = _only(message.tensors)
        gradient = decode(info, frames[0], shape=(None, self.width), dtype=self.job.wire.gradient)
        return Ticket(
            session.id, session.client, message.request, gradient, tokens=len(gradient), forward=message.forward
        )

    def update(self, session: Session, message: Update, frames: Sequence[Frame]) -> Ticket:
        """Values, or differences where the job compresses updates (`wire.update`, `wire.update_density`).

        Raises TensorError unless exactly the expected ones came; Refused for too large a weight.
        """
        self._check_weight(message.weight)
        read = self._differences if self.job.wire.compresses_updates else self._values
        values = read(message, frames)
        return Ticket(
            session.id,
            session.client,
            message.request,
            values,
            weight=message.weight,
            held=message.round,
            public=session.public,
        )

    def _differences(self, message: Update, frames: Sequence[Frame]) -> dict[str, Tensor]:
        if message.tensors:
            raise TensorError("the job's updates are differences in pieces (wire.update), not tensors")
        wire = self.job.wire
        return decompress(message.pieces, frames, self.update_shapes, wire.update_density, wire.update)

    def _values(self, message: Update, frames: Sequence[Frame]) -> dict[str, Tensor]:
        if message.pieces:
            raise TensorError("the job's updates are whole tensors in float32, not pieces of a difference")
        names = [info.name for info in message.tensors]
        if len(set(names)) != len(names) or set(names) != set(self.update_shapes):
            odd = sorted(set(names) ^ set(self.update_shapes))
            raise TensorError(f"the update's tensors are not those of the job, for example {odd[:1]}")
        return {
            info.name: decode(info, frame, shape=self.update_shapes[info.name], dtype="float32")
            for info, frame in zip(message.tensors, frames, strict=True)
        }

    def mask(self, session: Session, message: Mask) -> Ticket:
        """Raises Refused for a weight that cannot be, or none where the client has an adapter of its own here."""
        self._check_weight(message.weight)
        due = isinstance(message.body, AdvertiseKeys | RingInput)
        if due and message.weight == 0 and self.job.cohort.adapters == "per_client":
            raise Refused("the client's own adapter in the trunk has no weight", reason="weight")
        return Ticket(session.id, session.client, message.request, None, held=message.round, public=session.public)

    def _check_weight(self, weight: int) -> None:
        most = most_tokens(self.job)
        if weight > 1 and self.job.rounds.weighting == "clients":
            raise Refused(f"a weight of {weight}; all clients count alike (rounds.weighting)", reason="weight")
        if weight > most and self.job.rounds.weighting == "tokens":
            raise Refused(f"a weight of {weight}; a round has {most} target tokens at most", reason="weight")


def _only(tensors: Sequence[TensorInfo]) -> TensorInfo:
    if len(tensors) != 1:
        raise TensorError(f"one tensor belongs here, {len(tensors)} came")
    return tensors[0]
