"""Every error that flglm raises on purpose.

FlglmError
├── UsageError            what a person wrote is wrong                         exit 4
│   ├── JobError          a job file, or settings that contradict each other
│   ├── DataError         a data file, with its line
│   ├── ModelError        a checkpoint that is absent, corrupt or of an unknown family
│   ├── KeyFileError      an identity, card or invitation file
│   ├── CheckpointError   a training checkpoint that is absent, corrupt or of another job
│   └── LedgerError       a privacy ledger that is lost, corrupt or in another's hands
├── Refused               the other side said no                               exit 1
├── ConnectionFailed      nobody there, or gone                                exit 2
│   └── HandshakeError    the other side is not who it should be
├── DeadlineExceeded      a bounded wait ended                                 exit 3
├── AggregationError      a sum of masked updates that cannot be had           exit 2
│   ├── TooFewLeft        more clients dropped out than the threshold allows
│   └── ShareError        a client's keys or shares are not what it promised
└── PeerError             a message from outside broke a rule (they erred)     exit 2
    ├── FrameError        number or size of frames
    ├── EnvelopeError     kind or routing header
    ├── SealError         a record that does not open
    │   ├── ReplayError   its sequence number was seen before
    │   └── OrderError    it skips sequence numbers
    ├── SchemaError       an opened message that is not one of ours
    ├── PhaseError        a message, or a step, that does not fit the phase: early, late or repeated
    └── TensorError       a tensor's dtype, shape, size or values

`code` is what travels and what machines read; the message is one line for a person and names what to change. What it
quotes from a file or a peer is shown escaped, so that nobody else writes to a person's terminal.
"""

from typing import ClassVar

MAX_MESSAGE_CHARS = 2000


class FlglmError(Exception):
    """Base of all. `hint`, if given, says what to type or change."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 5

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = _one_line(message)
        super().__init__(self.message)
        self.hint = hint


def _one_line(message: str) -> str:
    """Printable characters alone, others as in a Python string, and not more than a person reads."""
    shown = message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 3] + "..."
    if shown.isprintable():
        return shown
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in shown)


class UsageError(FlglmError):
    code = "usage"
    exit_code = 4


class JobError(UsageError):
    code = "job"


class DataError(UsageError):
    code = "data"


class ModelError(UsageError):
    code = "model"


class KeyFileError(UsageError):
    code = "key_file"


class CheckpointError(UsageError):
    code = "checkpoint"


class LedgerError(UsageError):
    code = "ledger"


class Refused(FlglmError):
    """The other side refused. `reason` is its code (for example `job_differs`)."""

    code = "refused"
    exit_code = 1

    def __init__(self, message: str, *, reason: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class ConnectionFailed(FlglmError):
    code = "connection"
    exit_code = 2


class HandshakeError(ConnectionFailed):
    code = "handshake"


class DeadlineExceeded(FlglmError):
    code = "timeout"
    exit_code = 3


class AggregationError(FlglmError):
    """`clients` names those that are missing or at fault, as far as that is known."""

    code = "aggregation"
    exit_code = 2

    def __init__(self, message: str, *, clients: tuple[str, ...] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.clients = clients


class TooFewLeft(AggregationError):
    code = "too_few_left"


class ShareError(AggregationError):
    code = "share"


class PeerError(FlglmError):
    code = "peer"
    exit_code = 2


class FrameError(PeerError):
    code = "frame"


class EnvelopeError(PeerError):
    code = "envelope"


class SealError(PeerError):
    code = "seal"


class ReplayError(SealError):
    code = "replay"


class OrderError(SealError):
    code = "order"


class SchemaError(PeerError):
    code = "schema"


class PhaseError(PeerError):
    code = "phase"


class TensorError(PeerError):
    code = "tensor"
