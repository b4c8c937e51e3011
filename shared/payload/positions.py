"""Where the sent values of a vector lie: `count` ascending positions below `length`, in Elias-Fano coding (Elias,
"Efficient storage and retrieval by content and address of static files", Journal of the ACM 21(2), 1974).

Each position's lowest l = floor(log2(length / count)) bits are written as they are; what is above them, h, as a one at
place h + i of a second row of bits, i the position's number. Bits follow each other from the lowest of a byte; unused
ones at the end of either row are 0.

    low     ceil(count x l / 8) bytes
    high    ceil((count + (length - 1 >> l)) / 8) bytes

That is l + 2 to l + 3 bits a position, whatever their distances; and nothing where none, or all, are there.
"""

import numpy as np
from numpy.typing import NDArray

from shared.errors import TensorError

Positions = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def size(count: int, length: int) -> int:
    """Bytes of `count` positions, 0 <= count <= length."""
    return sum(-(-bits // 8) for bits in _bits(count, length))


def encode(positions: Positions, length: int) -> bytes:
    """Strictly ascending positions, 0 to length - 1."""
    count = len(positions)
    if count in (0, length):
        return b""
    low_bits, (_, high_size) = _low_bits(count, length), _bits(count, length)
    low: Bytes = (positions[:, None] >> np.arange(low_bits) & 1).astype(np.uint8)
    high: Bytes = np.zeros(high_size, dtype=np.uint8)
    high[(positions >> low_bits) + np.arange(count)] = 1
    return _packed(low.reshape(-1)) + _packed(high)


def decode(raw: Bytes, count: int, length: int) -> Positions:
    """Of `size(count, length)` bytes. Raises TensorError unless they are `count` strictly ascending positions below
    `length`, written in the one way there is.
    """
    if count in (0, length):
        return np.arange(count)
    low_bits, (low_size, high_size) = _low_bits(count, length), _bits(count, length)
    first = -(-low_size // 8)
    ones = np.flatnonzero(_unpacked(raw[first:], high_size))
    if len(ones) != count:
        raise TensorError(f"{len(ones)} positions of values, {count} announced")
    low = _unpacked(raw[:first], low_size).reshape(count, low_bits).astype(np.int64)
    positions: Positions = (ones - np.arange(count) << low_bits) + (low << np.arange(low_bits)).sum(axis=1)
    if positions[-1] >= length or bool((np.diff(positions) <= 0).any()):
        raise TensorError(f"positions of values that do not ascend from 0 to {length - 1}")
    return positions


def _low_bits(count: int, length: int) -> int:
    return (length // count).bit_length() - 1


def _bits(count: int, length: int) -> tuple[int, int]:
    """Of the low and the high row."""
    if count in (0, length):
        return 0, 0
    low_bits = _low_bits(count, length)
    return count * low_bits, count + (length - 1 >> low_bits)


def _packed(bits: Bytes) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _unpacked(raw: Bytes, count: int) -> Bytes:
    bits = np.unpackbits(raw, bitorder="little")
    if bits[count:].any():
        raise TensorError("positions of values with bits behind the last")
    return bits[:count]
