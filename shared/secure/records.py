"""Sealed records: the DATA messages of a session after its handshake.

Every body frame is sealed by itself with AES-256-GCM. The nonce is the frame's index (4 bytes) and the record's
sequence number (8 bytes), both big-endian; the associated data is `shared.wire.envelope.associated_data`: kind, number
of frames and the header's bytes. Each direction has its own key, which steps by the REKEY of Noise (revision 34,
sections 4.2 and 11.3) after every `REKEY_RECORDS` records. Records open only in the order in which they were sealed,
and what fails to open changes nothing.
"""

from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.errors import FrameError, OrderError, ReplayError, SealError
from shared.secure.symmetric import TAG_BYTES, rekey
from shared.wire.envelope import MAX_BODY_FRAMES, Data, Envelope, Frame, associated_data, pack

# At most 4096 frames of 2^26 blocks a record: 2^16 records stay far below the 2^32 seals that GCM allows a key
# (NIST SP 800-38D, section 8.3).
REKEY_RECORDS = 2**16
# AES-GCM here takes less than 2^31 bytes at once.
MAX_FRAME_BYTES = 2**30


class _Direction:
    """The key and the next sequence number of one direction. Old keys are dropped."""

    def __init__(self, key: bytes) -> None:
        self.sequence = 0
        self._use(key)

    def _use(self, key: bytes) -> None:
        self._key = key
        self.cipher = AESGCM(key)

    def advance(self) -> None:
        self.sequence += 1
        if self.sequence % REKEY_RECORDS == 0:
            self._use(rekey(self._key))

    def nonce(self, index: int) -> bytes:
        return index.to_bytes(4, "big") + self.sequence.to_bytes(8, "big")


class Sealer:
    """Seals the records of one direction of a session. For one thread at a time; the GIL is free while it works."""

    def __init__(self, session: bytes, key: bytes) -> None:
        self._session = session
        self._direction = _Direction(key)

    @property
    def sequence(self) -> int:
        """The number of the next record."""
        return self._direction.sequence

    def seal(self, frames: Sequence[Frame]) -> Envelope:
        """A DATA message with one sealed frame (16 bytes longer) a frame.

        `frames`: 1 to 4096 buffers of any shape, C-contiguous, at most 2^30 bytes each. Raises FrameError beyond that.
        """
        if not 1 <= len(frames) <= MAX_BODY_FRAMES:
            raise FrameError(f"a record has 1 to {MAX_BODY_FRAMES} frames, not {len(frames)}")
        plain = [_flat(frame) for frame in frames]
        body = [bytearray(len(frame) + TAG_BYTES) for frame in plain]
        envelope = pack(Data(session=self._session, sequence=self._direction.sequence), body)
        associated = associated_data(envelope)
        for index, (frame, sealed) in enumerate(zip(plain, body, strict=True)):
            self._direction.cipher.encrypt_into(self._direction.nonce(index), frame, associated, sealed)
        self._direction.advance()
        return envelope


class Opener:
    """Opens the records of one direction of a session. For one thread at a time; the GIL is free while it works."""

    def __init__(self, session: bytes, key: bytes) -> None:
        self._session = session
        self._direction = _Direction(key)

    def open(self, envelope: Envelope) -> list[bytearray]:
        """The frames of the next record, in fresh buffers.

        Raises ReplayError or OrderError for another sequence number than the next, SealError for anything else that
        is not the next record of this session and direction; it then still waits for the same record.
        """
        header = envelope.header
        if not isinstance(header, Data) or header.session != self._session:
            raise SealError("a message that is no record of this session")
        expected = self._direction.sequence
        if header.sequence < expected:
            raise ReplayError(f"record {header.sequence} was opened before; {expected} is next")
        if header.sequence > expected:
            raise OrderError(f"record {header.sequence} came before record {expected}")
        if not envelope.body:
            raise SealError("a record without frames: nothing in it is sealed")
        associated = associated_data(envelope)
        frames = [self._open_frame(index, sealed, associated) for index, sealed in enumerate(envelope.body)]
        self._direction.advance()
        return frames

    def _open_frame(self, index: int, sealed: Frame, associated: bytes) -> bytearray:
        size = memoryview(sealed).nbytes - TAG_BYTES
        if not 0 <= size <= MAX_FRAME_BYTES:
            raise SealError(f"frame {index} of a record has {size + TAG_BYTES} bytes, which no seal has")
        frame = bytearray(size)
        try:
            self._direction.cipher.decrypt_into(self._direction.nonce(index), sealed, associated, frame)
        except InvalidTag:
            raise SealError(f"frame {index} of a record does not open: another key, or changed on the way") from None
        return frame


class Channel:
    """Both directions of one session (16 bytes). The keys (32 bytes each) come from its handshake."""

    def __init__(self, session: bytes, *, send_key: bytes, receive_key: bytes) -> None:
        self.sealer = Sealer(session, send_key)
        self.opener = Opener(session, receive_key)

    def seal(self, frames: Sequence[Frame]) -> Envelope:
        """See `Sealer.seal`."""
        return self.sealer.seal(frames)

    def open(self, envelope: Envelope) -> list[bytearray]:
        """See `Opener.open`."""
        return self.opener.open(envelope)


def _flat(frame: Frame) -> memoryview:
    """The frame's bytes, not copied."""
    view = memoryview(frame)
    if view.nbytes > MAX_FRAME_BYTES:
        raise FrameError(f"a frame has at most {MAX_FRAME_BYTES} bytes, not {view.nbytes}: send fewer tokens at once")
    if not view.c_contiguous:
        raise FrameError("a frame must be C-contiguous")
    # A view with a zero in its shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
