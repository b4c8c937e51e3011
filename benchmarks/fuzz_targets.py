"""What must hold for every parser that faces a socket or a file, whatever bytes it gets.

A target gives True if its parser takes the bytes. It may refuse them with the errors that the parser promises, each
with a message of one printable line; any other error goes through, and so does AssertionError if what was taken breaks
a bound. `fuzz_seeds.SEEDS` has valid inputs for each.
"""

import atexit
import functools
import hashlib
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.fuzz_frames import separated
from benchmarks.fuzz_registry import target
from benchmarks.fuzz_seeds import (
    CLIENT,
    CLIENT_PUBLIC,
    FORMATS,
    KEM,
    OPEN,
    RANDOMNESS,
    RECORD_KEY,
    SEEDS,
    SERVER,
    SERVER_PUBLIC,
    SESSION,
    client_handshake,
    message_2,
    records,
)
from benchmarks.tiny_models import save_word_tokenizer
from launcher.supervisor import KINDS, load_plan
from shared import state_files
from shared.errors import (
    CheckpointError,
    DataError,
    EnvelopeError,
    FlglmError,
    FrameError,
    HandshakeError,
    JobError,
    KeyFileError,
    LedgerError,
    ModelError,
    Refused,
    SchemaError,
    SealError,
    TensorError,
    UsageError,
)
from shared.identity import load_card, load_identity
from shared.invitations import Invitation, load_invitation
from shared.job import Job, load_job, parse_job
from shared.model.checkpoint import INDEX, SINGLE, Checkpoint
from shared.payload import messages, pieces, positions
from shared.payload.codecs import CODECS
from shared.payload.pieces import PIECE, Piece
from shared.payload.tensors import MAX_ELEMENTS, TensorInfo, decode, encode
from shared.secure.handshake import MAX_PAYLOAD_BYTES, ServerHandshake
from shared.secure.noise import IKHFS, KEM_CIPHERTEXT_BYTES, KEM_PUBLIC_KEY_BYTES, HandshakeState, Randomness
from shared.secure.records import Opener
from shared.wire.envelope import Frame, pack, parse
from worker_client.data import load_rows
from worker_client.policy import check_job, check_server, load_policy
from worker_client.privacy.ledger import epsilon_of, read_entries

MAX_FILLED_BYTES = 2**16
MAX_TOKENS = 8
NOW = datetime(2030, 1, 1, tzinfo=UTC)
# Reads what a row may hold besides role and content, as chat templates do.
CHAT = (
    "{% for m in messages %}w9 {{ m.content }} {% for tool in m.tools or [] %}{{ tool.name }} {% endfor %}w8 "
    "{% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
)


@target(FrameError, EnvelopeError)
def envelope(data: bytes) -> None:
    """What is parsed is passed on as it came, and its header survives being packed."""
    frames = separated(data)
    parsed = parse(frames)
    assert parsed.frames() == frames
    assert parse(pack(parsed.header, parsed.body).frames()).header == parsed.header


@target(HandshakeError, Refused)
def handshake_1(data: bytes) -> None:
    """A server takes message 1 from nobody but its client."""
    _receive(data)


@target(HandshakeError, Refused)
def handshake_1_inside(data: bytes) -> None:
    """The same where everything authenticates: anybody can seal any KEM key, static key and payload for the server."""
    kem, rest = data[:KEM_PUBLIC_KEY_BYTES], data[KEM_PUBLIC_KEY_BYTES:]
    static, payload = rest[:32], rest[32:]
    randomness = Randomness(kem=lambda: cast(MLKEM768PrivateKey, _Claimed(kem)))
    state = HandshakeState(
        IKHFS,
        initiator=True,
        prologue=pack(OPEN).raw_header,
        static=cast(X25519PrivateKey, _Claimed(static)),
        remote_static=SERVER_PUBLIC,
        randomness=randomness,
    )
    _receive(state.write_message(payload))
    assert not payload


@target(HandshakeError)
def handshake_2(data: bytes) -> None:
    """A client takes message 2 from nobody but its server, and the genuine one after any other."""
    client = client_handshake()
    try:
        client.finish(data)
    except HandshakeError:
        assert client.finish(message_2())[1] == b"attestation"
        raise


@target(HandshakeError)
def handshake_2_inside(data: bytes) -> None:
    """The same where everything authenticates: an admitted server can send any KEM ciphertext and payload."""
    ciphertext, payload = data[:KEM_CIPHERTEXT_BYTES], data[KEM_CIPHERTEXT_BYTES:]
    client = client_handshake()
    secret = KEM.decapsulate(ciphertext) if len(ciphertext) == KEM_CIPHERTEXT_BYTES else bytes(32)
    state = HandshakeState(
        IKHFS,
        initiator=False,
        prologue=pack(OPEN).raw_header,
        static=SERVER,
        randomness=Randomness(x25519=RANDOMNESS.x25519, encapsulate=lambda key: (secret, ciphertext)),
    )
    state.read_message(client.message_1)
    assert client.finish(state.write_message(payload))[1] == payload
    assert len(payload) <= MAX_PAYLOAD_BYTES


@target(FrameError, EnvelopeError, SealError)
def record(data: bytes) -> None:
    """Nothing opens but the next record, and that one after any other."""
    opener = Opener(SESSION, RECORD_KEY)
    first, second = records()
    opener.open(first)
    try:
        opened = opener.open(parse(separated(data)))
    except FlglmError:
        opener.open(second)
        raise
    assert opened == [b"a message", b"", b"a tensor"]


@target(SchemaError, TensorError)
def client_message(data: bytes) -> None:
    """What a server takes survives being packed, and its tensors are what they announce."""
    message, frames = messages.unpack_from_client(separated(data))
    assert messages.unpack_from_client(messages.pack(message, frames))[0] == message
    _check_tensors(message, frames)


@target(SchemaError, TensorError)
def server_message(data: bytes) -> None:
    """The same for a client."""
    message, frames = messages.unpack_from_server(separated(data))
    assert messages.unpack_from_server(messages.pack(message, frames))[0] == message
    _check_tensors(message, frames)


@target(TensorError)
def tensor(data: bytes) -> None:
    """A tensor of any format, shape and scale; a frame short by little is filled up to the size that is due."""
    head = data[:2].ljust(2, b"\0")
    wire_format, dimensions = FORMATS[head[0] % len(FORMATS)], head[1] % 9
    size = 4 * dimensions + 8
    *shape, scale = struct.unpack(f">{dimensions}Id", data[2 : 2 + size].ljust(size, b"\0"))
    shape = [min(length, MAX_ELEMENTS) for length in shape]
    info = TensorInfo(
        name="x",
        dtype=wire_format,
        shape=tuple(shape),
        scale=scale if scale > 0 and math.isfinite(scale) else 1.0,
    )
    frame, due = data[2 + size :], CODECS[wire_format].size(shape) if math.prod(shape) else 0
    _check_tensor(info, frame.ljust(due, b"\0") if due <= MAX_FILLED_BYTES else frame)


@target(TensorError)
def update_piece(data: bytes) -> None:
    """A piece of a vector that announces any number of values, in any format; one short by little is filled up."""
    chosen, length, count = struct.unpack(">BII", data[:9].ljust(9, b"\0"))
    wire_format, length = FORMATS[chosen % len(FORMATS)], length % PIECE + 1
    count %= length + 2
    due = positions.size(min(count, length), length) + (CODECS[wire_format].size((count,)) if count else 0)
    frame = data[9:].ljust(due, b"\0") if due <= MAX_FILLED_BYTES else data[9:]
    piece = Piece(length=length, values=TensorInfo(name="", dtype=wire_format, shape=(count,), scale=1.0))
    vector = pieces.decode([piece], [frame], total=length, most=length, dtype=wire_format)
    assert vector.shape == (length,)
    assert bool(torch.isfinite(vector).all())
    assert int(vector.count_nonzero()) <= count


@target(LedgerError)
def privacy_ledger(data: bytes) -> None:
    """What was spent is a number, or not known."""
    assert not math.isnan(epsilon_of(read_entries(_file(data)), 1e-5))


@target(JobError)
def job(data: bytes) -> None:
    """A job that is taken has a digest, and is the same from its canonical JSON."""
    loaded = load_job(_file(data))
    again = parse_job(json.loads(loaded.canonical()), "canonical")
    assert again == loaded
    assert again.digest() == loaded.digest()


@target(JobError, Refused)
def policy(data: bytes) -> None:
    """A policy that is taken can be asked."""
    loaded = load_policy(_file(data))
    check_server(loaded, _invitation())
    check_job(loaded, Job(model_name_or_path="m"))


@target(JobError, UsageError)
def plan(data: bytes) -> None:
    """Every role that is taken begins with one of ours."""
    loaded = load_plan(_file(data))
    assert 1 <= len(loaded.roles) <= 64
    assert all(words[0] in KINDS for words in loaded.roles.values())


@target(KeyFileError)
def invitation(data: bytes) -> None:
    """An invitation that is taken names whole keys, and nothing in the clear beyond this machine."""
    loaded = load_invitation(_file(data), NOW)
    assert Invitation.model_validate_json(loaded.model_dump_json()) == loaded
    assert (len(loaded.server_public), len(loaded.job_digest)) == (32, 32)
    assert 1 <= len(loaded.brokers) <= 16
    assert all(broker.door.key is None or len(broker.door.key) == 32 for broker in loaded.brokers)


@target(KeyFileError)
def card(data: bytes) -> None:
    """A card that is taken holds two whole keys."""
    loaded = load_card(_file(data))
    assert (len(loaded.public), len(loaded.link_public)) == (32, 32)


@target(KeyFileError)
def key(data: bytes) -> None:
    """A key that is taken can be used; one that is not is not shown."""
    loaded = load_identity(_file(data))
    assert loaded.private.public_key().public_bytes_raw() == loaded.public


@target(DataError)
def rows(data: bytes) -> None:
    """Every row is of the length allowed, and has something to learn."""
    for row in load_rows(_file(data), _tokenizer(), max_length=MAX_TOKENS).rows:
        assert len(row.input_ids) == len(row.counts) <= MAX_TOKENS
        assert row.target_tokens > 0


@target(CheckpointError)
def checkpoint_facts(data: bytes) -> None:
    """Facts of any shape beside genuine tensors."""
    path = _checkpoint(state_files.FACTS)
    (path / state_files.FACTS).write_bytes(data)
    state_files.load(path.parent, 1)


@target(CheckpointError)
def checkpoint_tensors(data: bytes) -> None:
    """Tensors of any shape, with their true digest."""
    path = _checkpoint(state_files.TENSORS)
    (path / state_files.TENSORS).write_bytes(data)
    document = {"format": state_files.FORMAT, "tensors_sha256": hashlib.sha256(data).hexdigest(), "facts": {}}
    (path / state_files.FACTS).write_text(json.dumps(document))
    state_files.load(path.parent, 1)


@target(ModelError)
def model_config(data: bytes) -> None:
    """A configuration beside genuine tensors; one that is taken has a fingerprint."""
    (_model() / "config.json").write_bytes(data)
    Checkpoint(str(_model())).fingerprint()


@target(ModelError)
def model_index(data: bytes) -> None:
    """The same for an index."""
    (_model() / "config.json").write_bytes(SEEDS["model_config"]()[0])
    (_model() / INDEX).write_bytes(data)
    try:
        Checkpoint(str(_model())).fingerprint()
    finally:
        (_model() / INDEX).unlink()


class _Claimed:
    """A key pair by its public half alone: what is agreed with it is zeros, but for the client's own."""

    def __init__(self, public: bytes) -> None:
        self.public = public

    def public_key(self) -> "_Claimed":
        return self

    def public_bytes_raw(self) -> bytes:
        return self.public

    def exchange(self, other: X25519PublicKey) -> bytes:
        return CLIENT.exchange(other) if self.public == CLIENT_PUBLIC else bytes(32)


def _receive(message_1: bytes) -> None:
    server = ServerHandshake(SERVER, {CLIENT_PUBLIC: "anna"}.get)
    assert server.receive(pack(OPEN, [message_1])) == ("anna", CLIENT_PUBLIC)
    server.accept()


def _check_tensors(message: Any, frames: Sequence[Frame]) -> None:
    for info, frame in zip(getattr(message, "tensors", ()), frames, strict=True):
        _check_tensor(info, frame)


def _check_tensor(info: TensorInfo, frame: Frame) -> None:
    values = decode(info, frame)
    assert tuple(values.shape) == info.shape
    assert values.dtype == torch.float32
    assert bool(torch.isfinite(values).all())
    assert torch.equal(decode(*encode(info.name, values, "float32")), values)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="flglm-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(data: bytes) -> Path:
    """The bytes as a file that only its owner can read."""
    path = _folder() / "input"
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path


@functools.cache
def _checkpoint(name: str) -> Path:
    """A genuine checkpoint, for each name another."""
    return state_files.save(_folder() / name, 1, {"weight": torch.ones(2, 3)}, {"round": 1})


@functools.cache
def _model() -> Path:
    """A folder with tensors of a model and nothing else."""
    folder = _folder() / "model"
    folder.mkdir()
    save_file({"weight": torch.ones(2, 3)}, folder / SINGLE)
    return folder


@functools.cache
def _tokenizer() -> Any:
    folder = _folder() / "tokenizer"
    save_word_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    return tokenizer


@functools.cache
def _invitation() -> Invitation:
    return Invitation.model_validate_json(SEEDS["invitation"]()[0])
