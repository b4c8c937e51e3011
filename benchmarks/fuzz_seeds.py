"""Valid inputs of every parser that faces a socket or a file: what fuzzing starts from, and the keys behind it.

All keys are fixed, so that an input found in one process does the same in another.
"""

import functools
import json
import struct
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.fuzz_frames import joined
from benchmarks.fuzz_secagg import SECAGG_SEEDS
from shared import state_files
from shared.identity import Identity, card_of, fingerprint, key_digest
from shared.invitations import BrokerAt, Invitation
from shared.job import Job, WireFormat
from shared.payload import messages, pieces
from shared.payload.tensors import encode
from shared.secure.handshake import ClientHandshake, ServerHandshake
from shared.secure.noise import Randomness, public_bytes
from shared.secure.records import Sealer
from shared.wire import envelope
from shared.wire.curve import LinkKeys
from shared.wire.envelope import Envelope, Frame
from worker_client.privacy.ledger import Ledger

FORMATS: tuple[WireFormat, ...] = ("float32", "bfloat16", "float16", "int8", "int4")
SERVER, CLIENT, EPHEMERAL = (X25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2, 3))
SERVER_PUBLIC, CLIENT_PUBLIC = public_bytes(SERVER), public_bytes(CLIENT)
KEM = MLKEM768PrivateKey.from_seed_bytes(bytes(64))
RANDOMNESS = Randomness(x25519=lambda: EPHEMERAL, kem=lambda: KEM)
SESSION, RECORD_KEY = b"s" * 16, b"k" * 32
OPEN = envelope.Open(version=1, session=SESSION, server=key_digest(SERVER_PUBLIC), job=bytes(32))
MODEL = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "dtype": "float32", "head_dim": 8}
SHAPES = ((3, 2), (17, 33), (5,), (), (0, 4))


def client_handshake() -> ClientHandshake:
    return ClientHandshake(CLIENT, SERVER_PUBLIC, OPEN, randomness=RANDOMNESS)


@functools.cache
def message_2() -> bytes:
    """The genuine answer to what `client_handshake` says."""
    server = ServerHandshake(SERVER, lambda public: "anna", randomness=RANDOMNESS)
    server.receive(envelope.pack(OPEN, [client_handshake().message_1]))
    return server.accept(b"attestation")[0]


@functools.cache
def records() -> tuple[Envelope, Envelope]:
    """The first two records of a session."""
    sealer = Sealer(SESSION, RECORD_KEY)
    return sealer.seal([b"first"]), sealer.seal([b"a message", b"", b"a tensor"])


def _envelopes() -> list[bytes]:
    headers: list[envelope.Header] = [
        envelope.Hello(version=1, role="server", identity=bytes(32), replica=1, replicas=2),
        envelope.Welcome(version=1, heartbeat_s=2.0, timeout_s=15.0),
        envelope.Ping(),
        envelope.Pong(),
        OPEN,
        envelope.Accept(session=SESSION),
        envelope.Data(session=SESSION, sequence=7),
        envelope.Close(session=SESSION, code="client_gone", message="somebody disappeared"),
    ]
    bodies: list[list[Frame]] = [[b"body"] if type(header) in envelope.WITH_BODY else [] for header in headers]
    return [joined(envelope.pack(header, body).frames()) for header, body in zip(headers, bodies, strict=True)]


def _client_messages() -> list[bytes]:
    info, frame = encode("hidden", torch.ones(3, 2), "float32")
    small, compressed = encode("gradient", torch.ones(3, 2), "int4")
    return [
        joined(messages.pack(messages.Confirm())),
        joined(messages.pack(messages.Join(request=1, rows=5))),
        joined(
            messages.pack(
                messages.Forward(request=2, purpose="train", lengths=(2, 1), target_tokens=2, tensors=(info,)), [frame]
            )
        ),
        joined(messages.pack(messages.Backward(request=3, forward=2, tensors=(small,)), [compressed])),
        joined(messages.pack(messages.Generate(request=4, stream=1, lengths=(3,), tensors=(info,)), [frame])),
        joined(messages.pack(messages.Release(stream=1))),
        joined(messages.pack(messages.Update(request=5, round=1, weight=9, tensors=(info, info)), [frame, frame])),
        joined(messages.pack(messages.Leave())),
    ]


def _server_messages() -> list[bytes]:
    info, frame = encode("hidden", torch.ones(3, 2), "float16")
    job = Job(model_name_or_path="m").canonical().decode()
    return [
        joined(messages.pack(messages.Welcome(job=job, config="a" * 64, tensor_table="b" * 64, weights="c" * 64))),
        joined(messages.pack(messages.RoundStart(request=1, round=0, members=2, tensors=(info,)), [frame])),
        joined(messages.pack(messages.Hidden(request=2, tensors=(info,)), [frame])),
        joined(messages.pack(messages.Gradient(request=3))),
        joined(messages.pack(messages.Finished(request=4, rounds=3))),
        joined(messages.pack(messages.Refusal(request=5, code="wrong_step", message="why"))),
    ]


def _tensors() -> list[bytes]:
    """Format, number of dimensions, each of them (4 bytes), scale (8 bytes), values."""
    chosen = []
    for number, wire_format in enumerate(FORMATS):
        for shape in SHAPES:
            info, frame = encode("x", torch.ones(shape), wire_format)
            head = struct.pack(f">BB{len(shape)}Id", number, len(shape), *shape, info.scale)
            chosen.append(head + bytes(frame))
    return chosen


def _update_pieces() -> list[bytes]:
    """Format, length less 1 (4 bytes), how many values (4 bytes), positions and values."""
    found = []
    for number, wire_format in enumerate(FORMATS):
        for length, every in ((1, 1), (40, 1), (40, 3), (5000, 700)):
            chosen = torch.arange(length) % every == 0
            [piece], [frame] = pieces.encode(torch.ones(length), chosen, wire_format)
            found.append(struct.pack(">BII", number, length - 1, piece.values.shape[0]) + frame)
    return found


def _ledger() -> bytes:
    """Two jobs on one file of rows."""
    with tempfile.TemporaryDirectory() as name:
        ledger = Ledger(Path(name) / "ledger", "d" * 64)
        for noise in (1.0, 0.7):
            settings: dict[str, Any] = {
                "model_name_or_path": "m",
                "training": {"parts": ["head", "tail"]},
                "rounds": {"weighting": "clients"},
                "privacy": {"type": "central", "noise_multiplier": noise, "clip_norm": 1.0, "delta": 1e-5},
            }
            ledger.charge(Job.model_validate(settings))
        return ledger.path.read_bytes()


def _jobs() -> list[bytes]:
    job = Job(model_name_or_path="m").model_dump(mode="json")
    full = {"model_name_or_path": "m", "method": {"type": "full"}, "cohort": {"clients": 5, "quorum": 4}}
    return [
        yaml.safe_dump(job).encode(),
        json.dumps(job).encode(),
        yaml.safe_dump(full).encode(),
        b"model_name_or_path: &m name\nname: *m\nrounds: {<<: {count: 2}, local_steps: 0x10}\n",
    ]


def _policies() -> list[bytes]:
    policy = {"min_head_blocks": 1, "methods": ["lora"], "servers": [SERVER_PUBLIC.hex()], "max_rows": 9000}
    return [yaml.safe_dump(policy).encode(), b"{max_rounds: 50, least_noise: 0.0, share_updates: true}"]


def _plans() -> list[bytes]:
    return [
        b"roles:\n  router: [broker, --plain]\n  north: [client, train, --data, rows.jsonl]\n",
        b"roles: {a: [server]}",
    ]


def _invitations() -> list[bytes]:
    invitation = Invitation(
        id="0f" * 16,
        client="anna",
        brokers=[BrokerAt(address="tcp://broker.example.org:7000", key="0" * 64), BrokerAt(address="tcp://[::1]:7000")],
        server="trunk",
        server_public_key=SERVER_PUBLIC.hex(),
        job=bytes(32).hex(),
        expires_at=datetime(2100, 1, 1, tzinfo=UTC),
    )
    return [invitation.model_dump_json(indent=1).encode()]


def _cards() -> list[bytes]:
    identity = Identity("anna", CLIENT, CLIENT_PUBLIC, LinkKeys(bytes(32), bytes(32)))
    card = card_of(identity, "0f" * 16)
    assert card.fingerprint == fingerprint(CLIENT_PUBLIC, bytes(32))
    return [card.model_dump_json(indent=1).encode(), card_of(identity).model_dump_json().encode()]


def _keys() -> list[bytes]:
    return [json.dumps({"version": 1, "name": "anna", "private_key": "01" * 32}).encode()]


def _rows() -> list[bytes]:
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6", "tools": [{"name": "w7"}]}]
    rows: list[dict[str, Any]] = [{"text": "w5 w6"}, {"prompt": "w5", "completion": "w6 w7"}, {"messages": turns}]
    lines = [json.dumps(row).encode() for row in rows]
    return [*lines, b"\xef\xbb\xbf" + b"\n\n".join(lines) + b"\n"]


def _checkpoint() -> tuple[bytes, bytes]:
    """Facts and tensors."""
    with tempfile.TemporaryDirectory() as name:
        path = state_files.save(Path(name), 1, {"weight": torch.ones(2, 3)}, {"round": 1, "seen": [1, 2]})
        return (path / state_files.FACTS).read_bytes(), (path / state_files.TENSORS).read_bytes()


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "envelope": _envelopes,
    "handshake_1": lambda: [client_handshake().message_1],
    "handshake_1_inside": lambda: [KEM.public_key().public_bytes_raw() + CLIENT_PUBLIC],
    "handshake_2": lambda: [message_2()],
    "handshake_2_inside": lambda: [KEM.public_key().encapsulate()[1] + b"attestation"],
    "record": lambda: [joined(records()[1].frames())],
    "client_message": _client_messages,
    "server_message": _server_messages,
    "tensor": _tensors,
    "update_piece": _update_pieces,
    "job": _jobs,
    "policy": _policies,
    "plan": _plans,
    "invitation": _invitations,
    "card": _cards,
    "key": _keys,
    "rows": _rows,
    "privacy_ledger": lambda: [_ledger()],
    "checkpoint_facts": lambda: [_checkpoint()[0]],
    "checkpoint_tensors": lambda: [_checkpoint()[1]],
    "model_config": lambda: [json.dumps(MODEL).encode(), json.dumps({"model_type": "gpt2", "n_embd": 8}).encode()],
    "model_index": lambda: [json.dumps({"weight_map": {"weight": "model.safetensors"}}).encode()],
    **SECAGG_SEEDS,
}
