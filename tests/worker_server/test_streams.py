"""What generation streams may take, and that a refused request changes nothing."""

import copy

import pytest

from shared.errors import Refused
from worker_server.streams import StreamBook, StreamCaches, StreamLimits

A, B = b"a" * 16, b"b" * 16


@pytest.fixture
def book() -> StreamBook:
    book = StreamBook(StreamLimits(max_cached_tokens=30, max_length=12, max_streams=2))
    book.extend(A, 1, [4, 6])
    book.answered(A, 1)
    return book


@pytest.mark.parametrize(
    ("session", "stream", "lengths", "reason"),
    [
        (A, 1, [1], "stream_rows"),
        (A, 1, [1, 7], "too_long"),
        (B, 1, [13], "too_long"),
        (B, 1, [12, 9], "no_cache_room"),
    ],
)
def test_what_goes_too_far_is_refused(
    book: StreamBook, session: bytes, stream: int, lengths: list[int], reason: str
) -> None:
    before = copy.deepcopy(vars(book))
    with pytest.raises(Refused) as refused:
        book.extend(session, stream, lengths)
    assert refused.value.reason == reason
    assert vars(book) == before


def test_streams_go_on_one_request_at_a_time(book: StreamBook) -> None:
    book.extend(A, 1, [1, 1])
    assert book.lengths == {(A, 1): (5, 7)}
    with pytest.raises(Refused) as refused:
        book.extend(A, 1, [1, 1])
    assert refused.value.reason == "repeated"


def test_a_session_has_so_many_streams_and_may_release_them(book: StreamBook) -> None:
    book.extend(A, 2, [1])
    with pytest.raises(Refused) as refused:
        book.extend(A, 3, [1])
    assert refused.value.reason == "too_many_streams"
    assert book.release(A, 1) == [(A, 1)]
    assert book.release(A, 1) == []
    book.extend(A, 3, [12, 12])  # its tokens were given back too
    assert book.left(A) == [(A, 2), (A, 3)]
    assert book.lengths == {}


def test_a_stream_is_released_after_the_request_under_way(book: StreamBook) -> None:
    book.extend(A, 1, [1, 1])
    assert book.release(A, 1) == []
    with pytest.raises(Refused):
        book.extend(A, 1, [1, 1])
    assert book.answered(A, 1) == [(A, 1)]
    assert (book.lengths, book.busy, book.closing) == ({}, set(), set())


def test_caches_live_until_their_stream_is_released() -> None:
    caches = StreamCaches()
    first = caches.of(A, 1, 2)
    assert len(first) == 2
    assert caches.of(A, 1, 2) is first
    caches.release([(A, 1), (B, 9)])
    assert caches.of(A, 1, 2) is not first


def test_a_prefix_counts_for_every_row() -> None:
    book = StreamBook(StreamLimits(max_cached_tokens=30, max_length=12, max_streams=2, virtual_tokens=5))
    with pytest.raises(Refused) as refused:
        book.extend(A, 1, [8])
    assert refused.value.reason == "too_long"
    book.extend(A, 1, [4, 6])
    book.answered(A, 1)
    book.extend(A, 1, [1, 1])
    assert book.lengths[(A, 1)] == (10, 12)
    with pytest.raises(Refused) as refused:
        book.extend(B, 1, [4])
    assert refused.value.reason == "no_cache_room"
    book.extend(B, 1, [3])
