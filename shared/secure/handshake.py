"""The handshake of a session: OPEN carries Noise message 1, ACCEPT message 2 (pattern IKhfs, `shared.secure.noise`).

The client knows the server's public key from its invitation; the server learns the client's from message 1 and asks
`admitted` about it before it makes anything. The raw header of OPEN is the prologue, so both sides have seen the same
version, session, server and job, or the handshake fails. What fails changes nothing: the right message still succeeds.

Message 1 can be replayed by whoever recorded it. Only the first record that opens shows the server that the client is
there; until then a server must spend nothing on the session that it cannot spare.
"""

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import HandshakeError, Refused
from shared.secure.noise import IKHFS, KEM_CIPHERTEXT_BYTES, PUBLIC_KEY_BYTES, HandshakeState, Randomness
from shared.secure.records import Channel
from shared.secure.symmetric import TAG_BYTES
from shared.wire.envelope import Envelope, Open, pack

# The place of a server's attestation, in message 2. Everything else travels as records.
MAX_PAYLOAD_BYTES = 16 * 1024
MAX_MESSAGE_2_BYTES = PUBLIC_KEY_BYTES + KEM_CIPHERTEXT_BYTES + 2 * TAG_BYTES + MAX_PAYLOAD_BYTES


class ClientHandshake:
    """The client's side. `message_1` is the body of the OPEN message with header `header`.

    `static` is the client's key, `server_public` the server's public key (32 bytes).
    """

    def __init__(
        self,
        static: X25519PrivateKey,
        server_public: bytes,
        header: Open,
        *,
        randomness: Randomness | None = None,
    ) -> None:
        self._session = header.session
        self._state = HandshakeState(
            IKHFS,
            initiator=True,
            prologue=pack(header).raw_header,
            static=static,
            remote_static=server_public,
            randomness=randomness,
        )
        self.message_1 = self._state.write_message()

    def finish(self, message_2: bytes) -> tuple[Channel, bytes]:
        """The session's channel, and what the server says about itself (empty, or its attestation).

        Raises HandshakeError if `message_2` was not made by the owner of the server's key, for this very OPEN.
        """
        if len(message_2) > MAX_MESSAGE_2_BYTES:
            raise HandshakeError(f"the server's answer has {len(message_2)} bytes, more than any attestation needs")
        try:
            payload = self._state.read_message(message_2)
        except HandshakeError as error:
            raise HandshakeError(
                f"the server's answer does not fit: {error.message}",
                hint="compare the server's fingerprint with the invitation's, then try again",
            ) from error
        send, receive = self._state.split()
        return Channel(self._session, send_key=send, receive_key=receive), payload


class ServerHandshake:
    """The server's side, for one OPEN. `admitted` gives the name of a client's public key, None for a stranger's."""

    def __init__(
        self,
        static: X25519PrivateKey,
        admitted: Callable[[bytes], str | None],
        *,
        randomness: Randomness | None = None,
    ) -> None:
        self._static = static
        self._admitted = admitted
        self._randomness = randomness
        self._received: tuple[bytes, HandshakeState] | None = None

    def receive(self, envelope: Envelope) -> tuple[str, bytes]:
        """The client's name and public key (32 bytes), from an OPEN message.

        Raises HandshakeError if it does not authenticate, Refused (`unknown_client`) if its key is not admitted.
        """
        header = envelope.header
        if not isinstance(header, Open) or len(envelope.body) != 1:
            raise HandshakeError("a handshake starts with an OPEN message with one body frame")
        state = HandshakeState(
            IKHFS,
            initiator=False,
            prologue=envelope.raw_header,
            static=self._static,
            randomness=self._randomness,
        )
        if state.read_message(bytes(envelope.body[0])):
            raise HandshakeError("handshake message 1 has a payload, and must have none")
        public = state.remote_static
        name = self._admitted(public)
        if name is None:
            raise Refused(
                "this client's key is not admitted here",
                reason="unknown_client",
                hint="send your card to the server's operator, who admits it",
            )
        self._received = header.session, state
        return name, public

    def accept(self, payload: bytes = b"") -> tuple[bytes, Channel]:
        """Message 2 (the body of ACCEPT) and the session's channel. `payload`: at most 16 KiB, for attestation.

        Raises HandshakeError if there is nothing to accept (any more).
        """
        if self._received is None:
            raise HandshakeError("there is no OPEN message to accept")
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise HandshakeError(f"an attestation has at most {MAX_PAYLOAD_BYTES} bytes, not {len(payload)}")
        session, state = self._received
        message_2 = state.write_message(payload)
        receive, send = state.split()
        self._received = None
        return message_2, Channel(session, send_key=send, receive_key=receive)
