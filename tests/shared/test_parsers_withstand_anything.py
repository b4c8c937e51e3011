"""Every parser that faces a socket or a file takes any bytes, or refuses them with the errors that it promises.

The invariants are in benchmarks/fuzz_targets.py; here come random bytes, valid inputs with one thing changed, and those
that others have been broken with.
"""

import copy
import importlib.util
import json
import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_secagg_targets, fuzz_targets  # noqa: F401 - which register theirs
from benchmarks.fuzz_frames import joined, separated
from benchmarks.fuzz_parsers import require_atheris
from benchmarks.fuzz_registry import TARGETS
from benchmarks.fuzz_seeds import SEEDS
from shared.errors import UsageError

FRAMES = ("envelope", "record", "client_message", "server_message")
# Targets of secure sums, and how many bytes come before the frames.
SUMS = {"secagg_client": 1, "secagg_server": 2, "ring_member": 1, "ring_server": 2}
JSON = ("invitation", "card", "key", "rows", "privacy_ledger", "checkpoint_facts", "model_config", "model_index")
YAML = ("job", "policy", "plan")
EXAMPLES = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ODD = st.sampled_from(
    [
        None, True, -1, 0, 1, 2**31, 2**53, 2**63, 2**64 - 1, 0.5, 5e-324, 1e308, float("nan"), float("inf"),
        "", "\0", "\n", "\x1b[2J", "é", "x" * 5000, [], {}, nested(50), [None], {"": None}, {"type": "join"},
        "tcp://[::1:7000", "9999-12-31T23:59:59-23:59", "2e400", "~", "0x" + "f" * 5000,
    ]
)  # fmt: skip
NOT_IN_MSGPACK = st.sampled_from([2**64, -(2**63) - 1, 10**400, "\ud800"])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a document."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def one_thing_changed(draw: st.DrawFn, document: Any, odd: st.SearchStrategy[Any]) -> Any:
    """A document with one of its values replaced, dropped or doubled, or with a key more."""
    changed = copy.deepcopy(document)
    found = list(places(changed))
    if not found:
        return draw(odd)
    *way, last = draw(st.sampled_from(found))
    holder = changed
    for key in way:
        holder = holder[key]
    match draw(st.sampled_from(["replace", "replace", "drop", "add"])):
        case "replace":
            holder[last] = draw(odd)
        case "drop":
            del holder[last]
        case _ if isinstance(holder, dict):
            holder[draw(st.sampled_from(["more", "a\nb", "", last + last]))] = holder[last]
        case _:
            holder.append(holder[last])
    return changed


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """A valid input with some bytes replaced, cut out, put in or taken from another."""
    valid = SEEDS[name]()
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 1, 2, 8, 10_000])))
        other = draw(st.sampled_from(valid))
        some = st.sampled_from([b"", other, other[len(other) // 2 :], b"\xff" * 9, bytes(8), b"[" * 99])
        data[start:end] = draw(st.one_of(st.binary(max_size=8), some))
    return bytes(data)


def test_every_target_has_valid_inputs_and_takes_them() -> None:
    assert TARGETS.keys() == SEEDS.keys()
    for name, run in TARGETS.items():
        assert all(run(valid) for valid in SEEDS[name]()), name


@pytest.mark.parametrize("name", TARGETS)
@EXAMPLES
@given(data=st.data())
def test_any_bytes_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(st.binary(max_size=200)))


@pytest.mark.parametrize("name", TARGETS)
@EXAMPLES
@given(data=st.data())
def test_valid_inputs_with_other_bytes_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(mutated(name)))


@pytest.mark.parametrize("name", FRAMES)
@settings(EXAMPLES, max_examples=100)
@given(data=st.data())
def test_messages_with_another_field_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    frames = separated(data.draw(st.sampled_from(SEEDS[name]())))
    place = 1 if name in ("envelope", "record") else 0
    document = msgpack.unpackb(frames[place])
    frames[place] = msgpack.packb(data.draw(one_thing_changed(document, st.one_of(ODD, st.binary(max_size=40)))))
    TARGETS[name](joined(frames))


@pytest.mark.parametrize("name", SUMS)
@settings(EXAMPLES, max_examples=100)
@given(data=st.data())
def test_messages_of_sums_with_another_field_or_words_change_nothing(name: str, data: st.DataObject) -> None:
    valid = data.draw(st.sampled_from(SEEDS[name]()))
    before, frames = valid[: SUMS[name]], separated(valid[SUMS[name] :])
    document = msgpack.unpackb(frames[0])
    odd = st.one_of(ODD, st.binary(max_size=40), st.sampled_from([bytes(32), b"\xff" * 32, bytes(33), bytes(82)]))
    frames[0] = msgpack.packb(data.draw(one_thing_changed(document, odd)))
    if len(frames) > 1 and data.draw(st.booleans()):
        frames[1] = data.draw(st.binary(max_size=40))
    TARGETS[name](before + joined(frames))


@pytest.mark.parametrize("name", [*JSON, *YAML])
@settings(EXAMPLES, max_examples=40)
@given(data=st.data())
def test_files_with_another_setting_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    document = yaml.safe_load(SEEDS[name]()[0])
    changed = data.draw(one_thing_changed(document, st.one_of(ODD, NOT_IN_MSGPACK)))
    in_ascii = data.draw(st.booleans())
    TARGETS[name](json.dumps(changed, ensure_ascii=in_ascii).encode(errors="surrogatepass"))
    if name in YAML:
        TARGETS[name](yaml.safe_dump(changed).encode(errors="surrogatepass"))


def test_who_lacks_atheris_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        require_atheris()
    assert error.value.hint == "pip install -e '.[fuzz]' (Linux)"


def one_tensor(wire_format: int, shape: tuple[int, ...], frame: bytes, scale: float = 1.0) -> bytes:
    return struct.pack(f">BB{len(shape)}Id", wire_format, len(shape), *shape, scale) + frame


def announced(shape: list[int], frame: bytes = b"", **changes: Any) -> bytes:
    """A message with a tensor."""
    info = {"name": "x", "dtype": "float32", "shape": shape, "scale": 1.0} | changes
    message = {"type": "update", "request": 1, "round": 0, "weight": 1, "tensors": [info]}
    return joined([msgpack.packb(message), frame])


def laughs(levels: int, each: str) -> bytes:
    """Each level names the one before ten times."""
    named = (", ".join([f"*a{level}"] * 10) for level in range(levels))
    lines = [f"a{level}: &a{level} {each.format(names)}" for level, names in enumerate(named, start=1)]
    return "\n".join(["a0: &a0 {k: v}", *lines]).encode()


JOB = b"model_name_or_path: "
FLOAT32, INT8, INT4 = 0, 3, 4
NAN, INFINITE = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"
SMALL_NAN, NEGATIVE = b"\xc0\x7f", b"\x80\xbf"  # bfloat16
BOMBS = {
    "lists in lists": b"\x91" * 60_000,
    "maps in maps": b"\x81\xa1a" * 20_000,
    "2^31 entries": b"\xdd\x80\x00\x00\x00",
    "2^32 entries of a map": b"\xdf\xff\xff\xff\xff",
    "4 GiB of bytes": b"\xc6\xff\xff\xff\xff",
    "4 GiB of text": b"\xdb\xff\xff\xff\xff",
    "4 GiB of another type": b"\xc9\xff\xff\xff\xff\x01",
    "a time out of range": b"\x81\xa4type\xc7\x0c\xff" + b"\xff" * 12,
    "no UTF-8": b"\x81\xa4type\xa2\xff\xfe",
    "a list as a key": b"\x81\x90\x01",
    "many empty maps": b"\xdc\xff\xff" + b"\x80" * 65_532,
}
TENSORS = {
    "sizes whose product overflows": one_tensor(FLOAT32, (2**31, 2**31, 2**31, 2**31), b"xxxx"),
    "2^64 elements, which are 0 in 64 bits": one_tensor(FLOAT32, (2**31, 2**31, 4), b""),
    "no element, strides that overflow": one_tensor(FLOAT32, (0, 2**31, 2**31, 2**31), b""),
    "the same the other way round": one_tensor(INT8, (2**31, 2**31, 2**31, 0), b""),
    "2^31 values": one_tensor(INT4, (2**31,), b"x"),
    "a frame of another itemsize": one_tensor(FLOAT32, (2**15,), bytes(2**18)),
    "a byte too many": one_tensor(FLOAT32, (1,), bytes(5)),
    "NaN": one_tensor(FLOAT32, (2,), NAN + bytes(4)),
    "infinite": one_tensor(FLOAT32, (2,), bytes(4) + INFINITE),
    "infinite by its scale": one_tensor(2, (1,), b"\x00\x7b", scale=1e308),
    "NaN in a step": one_tensor(INT8, (1, 1), bytes(2) + SMALL_NAN + b"\x00"),
    "a negative step": one_tensor(INT4, (1, 1), bytes(2) + NEGATIVE + b"\x01"),
    "NaN in a minimum": one_tensor(INT8, (1, 1), SMALL_NAN + bytes(2) + b"\x00"),
    "NaN in a centre": one_tensor(INT8, (16, 1), SMALL_NAN + bytes(16 * 5)),
    "infinite by its code": one_tensor(INT8, (1, 1), bytes(2) + b"\x7f\x7f" + b"\xff"),
}
MESSAGES = {
    "a tensor larger than its frame": announced([2**31]),
    "nine dimensions": announced([1] * 9, bytes(4)),
    "a negative size": announced([-1]),
    "a size of more than 64 bits": announced([2**64 - 1]),
    "no element, strides that overflow": announced([0, 2**31, 2**31, 2**31]),
    "a format that is none of ours": announced([1], bytes(4), dtype="object"),
    "a scale of NaN": announced([1], bytes(4), scale=float("nan")),
    "NaN": announced([1], NAN),
    "tensors without frames": joined([separated(announced([1]))[0]]),
    "65,537 rows": joined(
        [msgpack.packb({"type": "generate", "request": 1, "stream": 1, "lengths": [1] * 65_537})[:65_535]]
    ),
}
JOBS = {
    "a billion laughs": laughs(9, "[{}]"),
    "a billion laughs as merges": laughs(9, "{{<<: [{}]}}"),
    "brackets": b"[" * 60_000,
    "braces": b"{" * 60_000,
    "dashes": b"- " * 30_000,
    "question marks": b"? " * 30_000,
    "itself": b"&a [*a]",
    "itself as a merge": b"&a {<<: *a, b: c}",
    "10 MB": JOB + b"x" * 10_000_000,
    "no UTF-8": JOB + b"\xff\xfe",
    "UTF-16": (JOB.decode() + "m").encode("utf-16"),
    "a control character": JOB + b"\x1b[2J",
    "an object": JOB + b"!!python/object/apply:os.system [id]",
    "an empty number": JOB + b'!!int ""',
    "no truth": JOB + b"!!bool perhaps",
    "no time": JOB + b"!!timestamp soon",
    "a character past the last": JOB + b'"\\UFFFFFFFF"',
    "half of a surrogate pair": JOB + b'"\\ud800"',
    "a number of 60 to the 250th": JOB + b"1" + b":00" * 250 + b".0",
    "a number of 10,000 digits": JOB + b"m\nrounds: {count: " + b"9" * 10_000 + b"}",
    "a number of 10,000 hexadecimal digits": JOB + b"m\nrounds: {count: 0x" + b"f" * 10_000 + b"}",
    "a day that is none": JOB + b"2001-99-99",
    "a key that is a list": b"? [a]\n: 1\n",
    "a key of two lines": b'"a\\nb": 1\n' + JOB + b"m",
    "a key that clears the screen": b'"\\e[2J": 1\n' + JOB + b"m",
    "two documents": JOB + b"m\n---\n" + JOB + b"m",
}
ROWS = {
    "a row of 20 MB of brackets": b"[" * 20_000_000,
    "a number of 20 MB": b'{"text": ' + b"9" * 20_000_000 + b"}",
    "objects in objects": b'{"a":' * 100_000,
    "no UTF-8": b'{"text": "\xff"}',
    "half of a surrogate pair": b'{"text": "\\ud800"}',
    "an assistant that speaks first": b'{"messages": [{"role": "assistant", "content": "w5"}]}',
    "tools that are none": b'{"messages": [{"role": "user", "content": "w5", "tools": 5},'
    b'{"role": "assistant", "content": "w5"}]}',
}
INVITATION = SEEDS["invitation"]()[0]
INVITATIONS = {
    "lists in lists": b"[" * 60_000,
    "10 MB": INVITATION.replace(b"trunk", b"t" * 10_000_000),
    "no UTF-8": INVITATION.replace(b"trunk", b"\xff\xfe"),
    "half of a surrogate pair": INVITATION.replace(b"trunk", b"\\ud800"),
    "before all time": INVITATION.replace(b"2100-01-01T00:00:00Z", b"0001-01-01T00:00:00+23:59"),
    "a number as its time": INVITATION.replace(b'"2100-01-01T00:00:00Z"', b"1" + b"0" * 5000),
    "an address that is none": INVITATION.replace(b"tcp://[::1]:7000", b"tcp://[::1:7000"),
    "a plain link that leaves": INVITATION.replace(b"tcp://[::1]:7000", b"tcp://broker.example.org:7000"),
    "a setting that clears the screen": INVITATION.replace(b'"id"', b'"\\u001b[2J"'),
}
FACTS = {"lists in lists": b"[" * 100_000, "10 MB": b"[" + b"0," * 5_000_000, "no UTF-8": b'"\xff"', "nothing": b""}
PAST_END = b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
LOW_ORDER = bytes([1]).ljust(32, b"\0")


def with_key(name: str, place: int, key: bytes) -> bytes:
    """A valid input with another key of the last client that it lists, or the only one."""
    valid = SEEDS[name]()[place]
    before, frames = valid[: SUMS[name]], separated(valid[SUMS[name] :])
    document = msgpack.unpackb(frames[0])
    entry = document["keys"][-1] if "keys" in document else document
    entry["sealing" if "sealing" in entry else "key"] = key
    return before + joined([msgpack.packb(document), *frames[1:]])


FROM_JSON = ("card", "key", "checkpoint_facts", "model_config", "model_index")
NASTY = [
    *(("envelope", what, joined([b"D", bomb[:1024], b"x"])) for what, bomb in BOMBS.items()),
    *((name, what, joined([bomb])) for name in ("client_message", "server_message") for what, bomb in BOMBS.items()),
    *((name, what, bytes(before) + joined([bomb])) for name, before in SUMS.items() for what, bomb in BOMBS.items()),
    *((name, "a key of low order", with_key(name, 0, LOW_ORDER)) for name in SUMS if name != "ring_member"),
    ("secagg_client_inside", "a commitment to something else", bytes(66) + bytes(32)),
    ("secagg_dealer", "shares of no secret", bytes(1) + b"\xff" * 198),
    ("secagg_dealer", "the same of who drops out", bytes([1]) + b"\xff" * 198),
    *(("tensor", what, data) for what, data in TENSORS.items()),
    *(("client_message", what, data) for what, data in MESSAGES.items()),
    *((name, what, data) for name in YAML for what, data in JOBS.items()),
    *(("rows", what, data) for what, data in ROWS.items()),
    *(("invitation", what, data) for what, data in INVITATIONS.items()),
    *((name, what, data) for name in FROM_JSON for what, data in FACTS.items()),
    ("checkpoint_tensors", "a header of 2^63 bytes", b"\xff" * 7 + b"\x7f{}"),
    ("checkpoint_tensors", "values past its end", struct.pack("<Q", len(PAST_END)) + PAST_END),
    ("handshake_1", "a key of zeros", bytes(1296)),
    ("handshake_1_inside", "a KEM key past its modulus", b"\xff" * 1184 + bytes(32)),
    ("handshake_1_inside", "a static key of zeros", SEEDS["handshake_1_inside"]()[0][:1184] + bytes(32)),
    ("handshake_1_inside", "a payload", SEEDS["handshake_1_inside"]()[0] + b"x"),
    ("handshake_2_inside", "a long attestation", SEEDS["handshake_2_inside"]()[0][:1088] + bytes(16_385)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "data"), NASTY, ids=[f"{name}: {what}" for name, what, _ in NASTY])
def test_what_has_broken_others_is_refused(name: str, what: str, data: bytes) -> None:
    assert not TARGETS[name](data), what
