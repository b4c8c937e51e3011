"""Several frames as one input of a fuzzing target, each with its length before it (2 bytes, big-endian)."""

from collections.abc import Sequence

from shared.wire.envelope import Frame


def joined(frames: Sequence[Frame]) -> bytes:
    """Frames as one input."""
    return b"".join(len(frame).to_bytes(2, "big") + bytes(frame) for frame in frames)


def separated(data: bytes) -> list[bytes]:
    """The frames of any input; the last may be cut off."""
    frames, at = [], 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2], "big")
        frames.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return frames
