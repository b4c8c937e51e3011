"""Float32 values as fixed-point integers modulo 2^32 or 2^64, so that masks cancel exactly; and the mean of a sum.

A client's word for value x with weight w is round(w * clip(x) * 2^f), and one word more carries w itself. f is the
largest for which the sum of all clients, with every value at the bound, does not overflow. w * clip(x) * 2^f is exact
in float64 (24 + 28 bits), so a client is off by 2^-(f+1) at most, and the weighted mean by

    contributors * 2^-(f+1) / (sum of weights)        <=  2^-(f+1), since every weight is at least 1,

before it is rounded to float32.

Under a group key (group_key.py) all words are multiples of 2^s, 2^s at least the number of clients: it takes s bits.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from shared.errors import AggregationError, TensorError

Words = NDArray[np.unsignedinteger[Any]]
Floats = NDArray[np.float32]

CHUNK = 2**16


@dataclass(frozen=True)
class FixedPoint:
    """`bits` of a word, `fraction_bits` f, `shift` s; `clip` is exactly a float32, at most the one asked for."""

    bits: Literal[32, 64]
    fraction_bits: int
    shift: int
    clip: float
    max_weight: int

    @classmethod
    def choose(cls, *, clip: float, max_weight: int, clients: int, largest_error: float, group_key: bool) -> Self:
        """The smaller word that is precise enough. Raises ValueError if none is."""
        bound = float(np.float32(clip))
        if bound > clip:
            bound = float(np.nextafter(np.float32(clip), np.float32(0)))
        shift = (clients - 1).bit_length() if group_key else 0
        for bits in (32, 64):
            room = Fraction(2 ** (bits - 1 - shift) - 1, clients)
            if room < max(max_weight, 1):
                continue
            fraction_bits = _floor_log2((room - Fraction(1, 2)) / (max_weight * Fraction(bound)))
            if 2.0 ** -(fraction_bits + 1) <= largest_error:
                return cls(bits, fraction_bits, shift, bound, max_weight)
        raise ValueError("largest_error: too small for 64-bit words; raise it, or lower clip or max_weight")

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Of words: unsigned, little-endian."""
        return np.dtype("<u4" if self.bits == 32 else "<u8")

    def largest_error(self, contributors: int, weight: int) -> float:
        """By how much a value of the mean of `contributors` clients of this total weight may be off, at most.

        Against the exact weighted mean of the clipped values; with its rounding to float32.
        """
        return contributors * 2.0 ** -(self.fraction_bits + 1) / weight + self.clip * 2.0**-24

    def encode(self, values: Floats, weight: int) -> Words:
        """Float32 (L,) to words (L + 1,), the last of them the weight; a chunk at a time.

        Raises TensorError for values that are not float32, one-dimensional and finite, or a weight out of bounds.
        """
        if values.dtype != np.float32 or values.ndim != 1:
            raise TensorError("an update is summed as one float32 vector")
        if not 1 <= weight <= self.max_weight:
            raise TensorError(f"a weight is from 1 to {self.max_weight} (max_weight), not {weight}")
        words = np.empty(len(values) + 1, self.dtype)
        scale = weight * 2.0**self.fraction_bits
        for start in range(0, len(values), CHUNK):
            chunk = values[start : start + CHUNK].astype(np.float64)
            if not np.isfinite(chunk).all():
                raise TensorError("an update with values that are NaN or infinite")
            scaled = np.rint(np.clip(chunk, -self.clip, self.clip) * scale)
            words[start : start + len(chunk)] = scaled.astype(np.int64).view(np.uint64) << np.uint64(self.shift)
        words[-1] = weight << self.shift
        return words

    def clipped(self, values: Floats) -> int:
        """How many values `encode` would clip."""
        starts = range(0, len(values), CHUNK)
        return sum(int(np.count_nonzero(np.abs(values[at : at + CHUNK]) > self.clip)) for at in starts)

    def mean(self, words: Words, contributors: int) -> tuple[Floats, int]:
        """Unmasked sums (L + 1,) of `contributors` clients to their weighted mean, float32 (L,), and total weight.

        Raises AggregationError if the total weight is none that they can have: masks are left in the sum.
        """
        signed = words.view(np.dtype(f"<i{self.bits // 8}"))
        weight = int(signed[-1]) >> self.shift
        if not contributors <= weight <= contributors * self.max_weight:
            raise AggregationError("masks did not cancel: some client did not follow the protocol; do the round again")
        mean = np.empty(len(words) - 1, np.float32)
        for start in range(0, len(mean), CHUNK):
            sums = signed[start : min(start + CHUNK, len(mean))] >> self.shift
            mean[start : start + CHUNK] = sums.astype(np.float64) / (2.0**self.fraction_bits * weight)
        return mean, weight


def _floor_log2(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1
