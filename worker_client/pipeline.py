"""Several batches under way at once, in an order that does not depend on when answers arrive.

A batch is sent (head forward), turned (tail forward and backward, when the trunk's output is there) and finished (head
backward, when the gradient is there). With `in_flight` under way on a slow link, a batch is turned half of them after
it was sent and finished all of them after: requests are spaced evenly over the two round trips of a batch. The order
is fixed, so that random numbers and sums are the same in every run.
"""

from collections.abc import Iterator
from typing import Literal

Action = Literal["send", "turn", "finish"]


def schedule(batches: int, in_flight: int) -> Iterator[tuple[Action, int]]:
    """What to do with which batch, in order; at most `in_flight` are sent and not finished."""
    lag = in_flight // 2
    for slot in range(batches + in_flight):
        if 0 <= slot - in_flight < batches:
            yield "finish", slot - in_flight
        if slot < batches:
            yield "send", slot
        if 0 <= slot - lag < batches:
            yield "turn", slot - lag
