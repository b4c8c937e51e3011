"""What every error says is one line that a terminal can show, whoever wrote what it quotes."""

import pytest

from shared.errors import MAX_MESSAGE_CHARS, FlglmError, Refused


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("the rôle 'a\\b' is 5 µs late", "the rôle 'a\\b' is 5 µs late"),
        ("two\nlines", r"two\nlines"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\u202eturned", r"\u202eturned"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_what_cannot_be_printed_is_escaped(message: str, shown: str) -> None:
    error = FlglmError(message)
    assert error.message == str(error) == shown


def test_a_long_message_is_cut() -> None:
    error = Refused("x" * 10**6, reason="policy")
    assert len(error.message) == MAX_MESSAGE_CHARS
    assert error.message.endswith("x...")
