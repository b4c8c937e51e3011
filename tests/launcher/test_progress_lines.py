"""What a person at a client is told: rounds are counted from one, wherever one is named."""

from typing import Any

import pytest

from launcher.progress import ClientProgress


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": "rounds_missed", "completed": 2, "round": 4}, "the others are at round 5; joining there"),
        ({"event": "left_behind", "round": 4}, "round 5 went on without this client"),
        ({"event": "update_refused", "round": 4, "reason": "NaN"}, "update of round 5 was left out: NaN"),
        ({"event": "update_repeated", "round": 4}, "the update of round 5 is handed in again"),
        ({"event": "update_clipped", "round": 4, "values": 3, "to": 1024.0}, "3 values of round 5's update"),
        ({"event": "shares_refused", "round": 4, "reason": "x"}, "left out of the sum of round 5: x"),
        ({"event": "resumed", "rounds": 4}, "resumed after 4 rounds"),
        ({"event": "round_done", "round": 4, "of": 9, "seconds": 2.0}, "round 5 of 9: 2.0 s"),
        (
            {"event": "evaluation", "rounds": 4, "loss": 1.5, "accuracy": 0.5, "rows": 8},
            "after 4 rounds: held-out loss 1.5",
        ),
    ],
    ids=lambda value: value["event"] if isinstance(value, dict) else "",
)
def test_a_round_is_named_as_people_count(
    event: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    ClientProgress(enabled=True).show(event)
    assert said in capsys.readouterr().err
