"""Checks of what came from outside, before it is used."""

from collections.abc import Collection, Iterable
from itertools import pairwise

import numpy as np

from shared.errors import SchemaError, TensorError
from shared.identity import Identity
from shared.secure_aggregation.fixed_point import FixedPoint, Words
from shared.secure_aggregation.terms import SumTerms
from shared.wire.envelope import Frame


def number_of(terms: SumTerms, identity: Identity) -> int:
    """The place of this identity among the members. Raises SchemaError if it is not there with this key."""
    for number, member in enumerate(terms.members):
        if member.public == identity.public:
            return number
    raise SchemaError(f"the terms' members do not have the key of {identity.name}")


def ascending(clients: Iterable[int], terms: SumTerms) -> tuple[int, ...]:
    """The numbers, if they are members', ascending, each once. Raises SchemaError."""
    numbers = tuple(clients)
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        raise SchemaError("clients in ascending order, each once, are due")
    if numbers and not 0 <= numbers[0] <= numbers[-1] < len(terms.members):
        raise SchemaError(f"client {numbers[-1]} of {len(terms.members)}")
    return numbers


def exactly(clients: Collection[int], due: Collection[int], what: str) -> None:
    """Raises SchemaError unless `clients` are those due, each once."""
    if len(clients) != len(due) or set(clients) != set(due):
        raise SchemaError(f"{what}: those of {len(due)} certain clients are due, {len(clients)} came")


def words_of(frame: Frame, encoding: FixedPoint, length: int) -> Words:
    """A frame as `length + 1` words, without a copy. Raises TensorError if it has another size."""
    size, due = memoryview(frame).nbytes, (length + 1) * encoding.dtype.itemsize
    if size != due:
        raise TensorError(f"a masked vector has {due} bytes, not {size}")
    return np.frombuffer(frame, encoding.dtype)
