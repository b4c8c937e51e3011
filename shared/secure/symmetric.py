"""The symmetric half of a Noise handshake: keys, chaining key and transcript hash for AESGCM and SHA256.

Noise Protocol Framework, revision 34, sections 4.2, 4.3, 5.1, 5.2 and 12.5 (https://noiseprotocol.org/noise.html).
It knows neither Diffie-Hellman nor patterns; those are in `shared.secure.noise`.
"""

import hashlib
import hmac
from dataclasses import dataclass, field, replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.errors import HandshakeError

KEY_BYTES = 32
TAG_BYTES = 16
# Reserved for `rekey` (section 4.2); no message ever gets it.
REKEY_NONCE = 2**64 - 1


def nonce_bytes(n: int) -> bytes:
    """Section 12.5: 32 bits of zeros and the counter, big-endian; 12 bytes."""
    return bytes(4) + n.to_bytes(8, "big")


def rekey(key: bytes) -> bytes:
    """REKEY of section 4.2: the key that follows `key`. One-way: the new key does not give the old one away."""
    return AESGCM(key).encrypt(nonce_bytes(REKEY_NONCE), bytes(KEY_BYTES), b"")[:KEY_BYTES]


def hkdf(chaining_key: bytes, input_key_material: bytes) -> tuple[bytes, bytes]:
    """HKDF of section 4.3 with two outputs of 32 bytes each."""
    temporary = hmac.digest(chaining_key, input_key_material, "sha256")
    first = hmac.digest(temporary, b"\x01", "sha256")
    return first, hmac.digest(temporary, first + b"\x02", "sha256")


@dataclass
class CipherState:
    """Section 5.1. Without a key (None) it passes everything through unchanged."""

    key: bytes | None = field(default=None, repr=False)
    n: int = 0

    @property
    def tag_bytes(self) -> int:
        """By how much a ciphertext is longer than its plaintext, in bytes."""
        return 0 if self.key is None else TAG_BYTES

    def encrypt(self, associated: bytes, plaintext: bytes) -> bytes:
        if self.key is None:
            return plaintext
        ciphertext = AESGCM(self.key).encrypt(nonce_bytes(self.n), plaintext, associated)
        self.n += 1
        return ciphertext

    def decrypt(self, associated: bytes, ciphertext: bytes) -> bytes:
        """Raises HandshakeError if the tag is wrong; the counter then stays."""
        if self.key is None:
            return ciphertext
        try:
            plaintext = AESGCM(self.key).decrypt(nonce_bytes(self.n), ciphertext, associated)
        except InvalidTag:
            raise HandshakeError("a handshake message does not open: another key, or changed on the way") from None
        self.n += 1
        return plaintext


@dataclass
class SymmetricState:
    """Section 5.2: chaining key `ck`, transcript hash `h` (32 bytes each) and the current cipher."""

    ck: bytes = field(repr=False)
    h: bytes
    cipher: CipherState = field(default_factory=CipherState)

    @classmethod
    def initialize(cls, protocol_name: bytes) -> "SymmetricState":
        short = len(protocol_name) <= hashlib.sha256().digest_size
        h = protocol_name.ljust(32, b"\0") if short else hashlib.sha256(protocol_name).digest()
        return cls(ck=h, h=h)

    def copy(self) -> "SymmetricState":
        return replace(self, cipher=replace(self.cipher))

    def mix_key(self, input_key_material: bytes) -> None:
        self.ck, key = hkdf(self.ck, input_key_material)
        self.cipher = CipherState(key)

    def mix_hash(self, data: bytes) -> None:
        self.h = hashlib.sha256(self.h + data).digest()

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext = self.cipher.encrypt(self.h, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        plaintext = self.cipher.decrypt(self.h, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[bytes, bytes]:
        """The two transport keys: initiator to responder, responder to initiator; 32 bytes each."""
        return hkdf(self.ck, b"")
