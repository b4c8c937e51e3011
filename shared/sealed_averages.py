"""The averages of head and tail in a box that the clients of a group open, and the server that keeps it does not.

    box = salt (32 random bytes) + AES-256-GCM(values), values float32, little-endian, end to end by name
    key = HKDF-SHA256 (the group's seed; purpose, the job's digest, salt, round), associated data: digest, round

Whoever seals a round's averages again (another client, or the same after it was killed) does so under another key.
"""

import os

import numpy as np

from shared.errors import AggregationError, TensorError
from shared.secure_aggregation import keys
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.keys import TAG_BYTES
from shared.secure_aggregation.shamir import Random
from shared.wire.envelope import Frame

SALT_BYTES = 32
FLOAT = np.dtype("<f4")


def box_bytes(length: int) -> int:
    """How large the box of so many values is."""
    return SALT_BYTES + length * FLOAT.itemsize + TAG_BYTES


def seal(group: GroupKey, job: bytes, round: int, values: Floats, random: Random = os.urandom) -> bytes:
    """The values (L,), float32, with which round `round` begins. `job`: its digest, 32 bytes."""
    salt = random(SALT_BYTES)
    return salt + keys.seal(_key(group, job, round, salt), values.astype(FLOAT).tobytes(), _bound(job, round))


def unseal(group: GroupKey, job: bytes, round: int, length: int, box: Frame) -> Floats:
    """The values (length,). Raises AggregationError if they do not open, TensorError for another number of them or
    values that are NaN or infinite.
    """
    whole = bytes(box)
    salt, sealed = whole[:SALT_BYTES], whole[SALT_BYTES:]
    plaintext = keys.unseal(_key(group, job, round, salt), sealed, _bound(job, round)) if sealed else None
    if plaintext is None:
        raise AggregationError(
            f"the averages with which round {round} begins do not open under this group's key: they were sealed under "
            "another key, for another job or round, or changed on the way",
            hint="compare the fingerprint of the group's key with the other data owners",
        )
    if len(plaintext) != length * FLOAT.itemsize:
        raise TensorError(f"the sealed averages have {len(plaintext)} bytes, not {length * FLOAT.itemsize}")
    values = np.frombuffer(plaintext, FLOAT).astype(np.float32)
    if not np.isfinite(values).all():
        raise TensorError("the sealed averages hold NaN or infinite values")
    return values


def _key(group: GroupKey, job: bytes, round: int, salt: bytes) -> bytes:
    return keys.derive(group.seed, "averages", job + salt, round)


def _bound(job: bytes, round: int) -> bytes:
    return job + round.to_bytes(8)
