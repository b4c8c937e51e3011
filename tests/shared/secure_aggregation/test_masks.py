"""Masks are AES-256-CTR key streams, whatever the chunks, and cancel."""

import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from shared.secure_aggregation.fixed_point import CHUNK
from shared.secure_aggregation.masks import STREAMS_AT_ONCE, Mask, add_masks

KEY = bytes(range(32))


def key_stream(key: bytes, blocks: int) -> bytes:
    """By the definition of the counter mode (NIST SP 800-38A, 6.5): AES of 0, 1, 2, …"""
    counters = b"".join(number.to_bytes(16) for number in range(blocks))
    return Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(counters)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("length", [1, 3, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("times", [1, -1, -7])
def test_a_mask_is_the_key_stream(dtype: str, length: int, times: int) -> None:
    words = np.arange(length).astype(dtype)
    add_masks(words, [Mask(KEY, times)])
    stream = np.frombuffer(key_stream(KEY, length * words.itemsize // 16 + 1), dtype)[:length]
    bits = 8 * words.itemsize
    for place in (0, length // 2, length - 1):
        assert int(words[place]) == (place + times * int(stream[place])) % 2**bits
    assert (words == (np.arange(length).astype(dtype) + stream * np.dtype(dtype).type(times % 2**bits))).all()


def test_many_masks_cancel() -> None:
    words = np.arange(CHUNK + 9, dtype="<u4")
    keys = [number.to_bytes(32) for number in range(2 * STREAMS_AT_ONCE + 3)]
    add_masks(words, [Mask(key) for key in keys])
    assert (words != np.arange(len(words))).mean() > 0.99
    add_masks(words, [Mask(key, -1) for key in reversed(keys)])
    assert (words == np.arange(len(words))).all()


def test_memory_grows_neither_with_the_length_nor_with_the_number_of_masks() -> None:
    words = np.zeros(2_000_000, "<u4")
    masks = [Mask(number.to_bytes(32)) for number in range(150)]
    tracemalloc.start()
    add_masks(words, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20 < words.nbytes
