"""Noise handshakes (revision 34, section 5.3), driven by patterns that are data.

Sources: the Noise Protocol Framework (https://noiseprotocol.org/noise.html), and for the tokens `e1` and `ekem1`
"KEM-based Hybrid Forward Secrecy for Noise" (https://github.com/noiseprotocol/noise_hfs_spec), sections 4 and 5, with
ML-KEM-768 (FIPS 203) as the KEM. A message is either taken whole or changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from shared.errors import HandshakeError
from shared.secure.symmetric import SymmetricState

PUBLIC_KEY_BYTES = 32
KEM_PUBLIC_KEY_BYTES = 1184
KEM_CIPHERTEXT_BYTES = 1088
MAX_MESSAGE_BYTES = 65535

Token = Literal["e", "s", "ee", "es", "se", "ss", "e1", "ekem1"]
Known = TypeVar("Known")


@dataclass(frozen=True)
class Pattern:
    """`pre_messages`: what the initiator and what the responder is known by beforehand. `messages`: in turns."""

    protocol_name: str
    pre_messages: tuple[tuple[Literal["s"], ...], tuple[Literal["s"], ...]]
    messages: tuple[tuple[Token, ...], ...]


IKHFS = Pattern(
    protocol_name="Noise_IKhfs_25519+MLKEM768_AESGCM_SHA256",
    pre_messages=((), ("s",)),
    messages=(("e", "es", "e1", "s", "ss"), ("e", "ee", "ekem1", "se")),
)


@dataclass(frozen=True)
class Randomness:
    """Where fresh keys come from. `encapsulate` gives the shared secret and the ciphertext, in this order."""

    x25519: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate
    kem: Callable[[], MLKEM768PrivateKey] = MLKEM768PrivateKey.generate
    encapsulate: Callable[[MLKEM768PublicKey], tuple[bytes, bytes]] = lambda key: key.encapsulate()


@dataclass
class _Progress:
    symmetric: SymmetricState
    messages_done: int = 0
    ephemeral: X25519PrivateKey | None = field(default=None, repr=False)
    kem: MLKEM768PrivateKey | None = field(default=None, repr=False)
    remote_static: bytes | None = None
    remote_ephemeral: bytes | None = None
    remote_kem: MLKEM768PublicKey | None = None

    def copy(self) -> "_Progress":
        return replace(self, symmetric=self.symmetric.copy())


class HandshakeState:
    """One side of one handshake. Messages are `bytes` of at most 65535; what fails raises HandshakeError.

    `remote_static` is the other side's public key (32 bytes) where the pattern needs it beforehand.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        initiator: bool,
        prologue: bytes,
        static: X25519PrivateKey | None = None,
        remote_static: bytes | None = None,
        randomness: Randomness | None = None,
    ) -> None:
        self._pattern = pattern
        self._initiator = initiator
        self._static = static
        self._randomness = randomness or Randomness()
        symmetric = SymmetricState.initialize(pattern.protocol_name.encode())
        symmetric.mix_hash(prologue)
        for of_initiator, tokens in zip((True, False), pattern.pre_messages, strict=True):
            for _ in tokens:
                own = of_initiator == initiator
                symmetric.mix_hash(self._static_public() if own else _known(remote_static, "the other static key"))
        self._progress = _Progress(symmetric, remote_static=remote_static)

    @property
    def finished(self) -> bool:
        return self._progress.messages_done == len(self._pattern.messages)

    @property
    def remote_static(self) -> bytes:
        """The other side's public key, 32 bytes. Raises HandshakeError as long as it is unknown."""
        return _known(self._progress.remote_static, "the other static key")

    @property
    def handshake_hash(self) -> bytes:
        """The transcript hash so far, 32 bytes; once finished, it names this session (section 11.2).

        Published test vectors name it, and tests compare it with theirs; nothing here binds to it.
        """
        return self._progress.symmetric.h

    def write_message(self, payload: bytes = b"") -> bytes:
        progress = self._progress.copy()
        parts = [self._write(progress, token) for token in self._tokens(of_initiator=self._initiator)]
        message = b"".join(parts) + progress.symmetric.encrypt_and_hash(payload)
        if len(message) > MAX_MESSAGE_BYTES:
            raise HandshakeError(f"a handshake message has at most {MAX_MESSAGE_BYTES} bytes, not {len(message)}")
        progress.messages_done += 1
        self._progress = progress
        return message

    def read_message(self, message: bytes) -> bytes:
        """The payload of the other side's next message."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise HandshakeError(f"a handshake message has at most {MAX_MESSAGE_BYTES} bytes, not {len(message)}")
        progress = self._progress.copy()
        rest = message
        for token in self._tokens(of_initiator=not self._initiator):
            rest = self._read(progress, token, rest)
        payload = progress.symmetric.decrypt_and_hash(rest)
        progress.messages_done += 1
        self._progress = progress
        return payload

    def split(self) -> tuple[bytes, bytes]:
        """The keys of the two directions: initiator to responder, responder to initiator; 32 bytes each."""
        if not self.finished:
            raise HandshakeError("the handshake is not finished: it gives no keys yet")
        return self._progress.symmetric.split()

    def _tokens(self, *, of_initiator: bool) -> tuple[Token, ...]:
        done = self._progress.messages_done
        if self.finished or of_initiator != (done % 2 == 0):
            raise HandshakeError(f"no message of this side is due after {done} handshake messages")
        return self._pattern.messages[done]

    def _write(self, progress: _Progress, token: Token) -> bytes:
        symmetric = progress.symmetric
        if token == "e":
            progress.ephemeral = self._randomness.x25519()
            public = public_bytes(progress.ephemeral)
            symmetric.mix_hash(public)
            return public
        if token == "s":
            return symmetric.encrypt_and_hash(self._static_public())
        if token == "e1":
            progress.kem = self._randomness.kem()
            return symmetric.encrypt_and_hash(progress.kem.public_key().public_bytes_raw())
        if token == "ekem1":
            secret, ciphertext = self._randomness.encapsulate(_known(progress.remote_kem, "the KEM key"))
            sealed = symmetric.encrypt_and_hash(ciphertext)
            symmetric.mix_key(secret)
            return sealed
        self._mix_shared(progress, token)
        return b""

    def _read(self, progress: _Progress, token: Token, message: bytes) -> bytes:
        symmetric = progress.symmetric
        tag = symmetric.cipher.tag_bytes
        if token == "e":
            progress.remote_ephemeral, rest = _cut(message, PUBLIC_KEY_BYTES)
            symmetric.mix_hash(progress.remote_ephemeral)
            return rest
        if token == "s":
            sealed, rest = _cut(message, PUBLIC_KEY_BYTES + tag)
            progress.remote_static = symmetric.decrypt_and_hash(sealed)
            return rest
        if token == "e1":
            sealed, rest = _cut(message, KEM_PUBLIC_KEY_BYTES + tag)
            progress.remote_kem = _kem_public(symmetric.decrypt_and_hash(sealed))
            return rest
        if token == "ekem1":
            sealed, rest = _cut(message, KEM_CIPHERTEXT_BYTES + tag)
            ciphertext = symmetric.decrypt_and_hash(sealed)
            symmetric.mix_key(_known(progress.kem, "the KEM key").decapsulate(ciphertext))
            return rest
        self._mix_shared(progress, token)
        return message

    def _mix_shared(self, progress: _Progress, token: Token) -> None:
        """Diffie-Hellman. The first letter of `token` is the initiator's key, the second the responder's."""
        own, other = (token[0], token[1]) if self._initiator else (token[1], token[0])
        private = progress.ephemeral if own == "e" else self._static
        public = progress.remote_ephemeral if other == "e" else progress.remote_static
        try:
            remote = X25519PublicKey.from_public_bytes(_known(public, "the other public key"))
            shared = _known(private, "the own private key").exchange(remote)
        except ValueError:
            # 32 bytes are due; and RFC 7748, section 6.1: all zeros as the result mean a key of low order.
            raise HandshakeError("the other side's public key is none that X25519 can use") from None
        progress.symmetric.mix_key(shared)

    def _static_public(self) -> bytes:
        return public_bytes(_known(self._static, "the own static key"))


def public_bytes(private: X25519PrivateKey) -> bytes:
    """The public key of `private`, 32 bytes."""
    return private.public_key().public_bytes_raw()


def _known(value: Known | None, what: str) -> Known:
    if value is None:
        raise HandshakeError(f"the handshake needs {what}, which is not known yet")
    return value


def _cut(message: bytes, size: int) -> tuple[bytes, bytes]:
    if len(message) < size:
        raise HandshakeError(f"a handshake message ends early: {size} bytes are due, {len(message)} are left")
    return message[:size], message[size:]


def _kem_public(raw: bytes) -> MLKEM768PublicKey:
    try:
        return MLKEM768PublicKey.from_public_bytes(raw)
    except ValueError:
        raise HandshakeError("the other side sent an ML-KEM-768 key that breaks FIPS 203") from None
