"""Generation streams: rows that go on token by token, what they may take, and what is kept for them.

`StreamBook` keeps the accounts on the socket thread: how long each stream's rows are, whether a request is under way,
what is left of the budget. The keys and values themselves belong to the compute thread (`StreamCaches`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared.errors import Refused
from shared.model.kv_cache import RowCache

Key = tuple[bytes, int]


@dataclass(frozen=True)
class StreamLimits:
    """`max_cached_tokens` over all streams; `max_length` of a row; `max_streams` of a session.

    Every row begins with `virtual_tokens` of a prefix, which count.
    """

    max_cached_tokens: int
    max_length: int
    max_streams: int
    virtual_tokens: int = 0


class StreamBook:
    def __init__(self, limits: StreamLimits) -> None:
        self.limits = limits
        self.lengths: dict[Key, tuple[int, ...]] = {}
        self.busy: set[Key] = set()
        self.closing: set[Key] = set()

    def extend(self, session: bytes, stream: int, lengths: Sequence[int]) -> None:
        """Note that the stream's rows become longer by `lengths`; a new number opens a stream.

        Raises Refused, and then changes nothing.
        """
        key = (session, stream)
        before = self.lengths.get(key, (self.limits.virtual_tokens,) * len(lengths))
        if key in self.busy:
            raise Refused(f"a request of stream {stream} is under way", reason="repeated")
        if key not in self.lengths and sum(s == session for s, _ in self.lengths) >= self.limits.max_streams:
            raise Refused(f"{self.limits.max_streams} streams are open; release one", reason="too_many_streams")
        if len(before) != len(lengths):
            raise Refused(f"stream {stream} has {len(before)} rows, {len(lengths)} came", reason="stream_rows")
        after = tuple(old + new for old, new in zip(before, lengths, strict=True))
        if max(after) > self.limits.max_length:
            raise Refused(f"a row of {max(after)} tokens; the longest is {self.limits.max_length}", reason="too_long")
        kept = sum(sum(rows) for rows in self.lengths.values())
        more = sum(after) - sum(self.lengths.get(key, ()))
        if kept + more > self.limits.max_cached_tokens:
            raise Refused(
                f"the server keeps {kept} of {self.limits.max_cached_tokens} tokens: no room for {more} more",
                reason="no_cache_room",
            )
        self.lengths[key] = after
        self.busy.add(key)

    def answered(self, session: bytes, stream: int) -> list[Key]:
        """The request under way is done; what the compute thread must forget."""
        key = (session, stream)
        self.busy.discard(key)
        return self.release(session, stream) if key in self.closing else []

    def release(self, session: bytes, stream: int) -> list[Key]:
        """Forget a stream, after the request under way; what the compute thread must forget. Not open: nothing."""
        key = (session, stream)
        if key in self.busy:
            self.closing.add(key)
            return []
        self.closing.discard(key)
        return [key] if self.lengths.pop(key, None) is not None else []

    def left(self, session: bytes) -> list[Key]:
        """Forget all streams of a session, which is over."""
        keys = [key for key in self.lengths if key[0] == session]
        for key in keys:
            del self.lengths[key]
            self.busy.discard(key)
            self.closing.discard(key)
        return keys


class StreamCaches:
    """Keys and values by stream, one cache a row."""

    def __init__(self) -> None:
        self._caches: dict[Key, list[RowCache]] = {}

    def of(self, session: bytes, stream: int, rows: int) -> list[RowCache]:
        return self._caches.setdefault((session, stream), [RowCache() for _ in range(rows)])

    def release(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._caches.pop(key, None)
