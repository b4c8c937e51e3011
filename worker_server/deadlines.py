"""How long the first of a step's members wait for the last: a deadline that adapts to what the members need.

As in hivemind (pull request 676), it is the median of the members' recent times and `cohort.deadline_mads` median
absolute deviations: half of the members may be as late as they like without moving it far, which with mean and standard
deviation one could (Leys et al. 2013, Journal of Experimental Social Psychology 49, "Detecting outliers").

A member's time is how long after the first member's request for the same thing its own came. Things of a kind are held
together: the first hidden states of a round (clients may evaluate before), other hidden states, gradients, updates, and
of a masked sum each message by itself: one is as long as what is trained, the others are short. Who was left behind
counts with the time that he was waited for; so a deadline that lets go of too many grows again. Who opens a sum alone,
under a group's key, has no others to be measured against, but the limit.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Literal

Kind = Literal["first", "forward", "backward", "update", "keys", "shares", "input", "unmask", "open"]

WINDOW = 16
"""How many collections (one request of each member) of a kind count."""
LEAST = 5
"""With fewer of them the limit stands."""
FLOOR_S = 1.0
"""No deadline is shorter: a pause of the network, of a disk, of a garbage collector is no lateness."""


AFTER_TRAINING: tuple[Kind, ...] = ("update", "keys")
"""What comes first after local steps; in plain FedAvg those of a whole round."""


class Deadlines:
    """Seconds by kind. Without `mads` it is `limit_s` always, else never more; for what comes after local steps that is
    `training_s`, if given. No clocks: times are handed in.
    """

    def __init__(self, limit_s: float, mads: float | None = None, training_s: float | None = None) -> None:
        self.limits: dict[Kind, float] = {} if training_s is None else dict.fromkeys(AFTER_TRAINING, training_s)
        self.limit_s = limit_s
        self.mads = mads
        self._recent: dict[Kind, deque[tuple[float, ...]]] = {}
        self._current: dict[Kind, float] = {}

    def of(self, kind: Kind) -> float:
        return self._current.get(kind, self._limit(kind))

    def _limit(self, kind: Kind) -> float:
        return self.limits.get(kind, self.limit_s)

    def record(self, kind: Kind, times: Sequence[float]) -> None:
        """A collection is complete: its members' times, in seconds."""
        if self.mads is None or len(times) < 2:  # who is alone waits for nobody
            return
        recent = self._recent.setdefault(kind, deque(maxlen=WINDOW))
        recent.append(tuple(times))
        if len(recent) < LEAST:
            return
        pooled = [time for collection in recent for time in collection]
        middle = median(pooled)
        deviation = median(abs(time - middle) for time in pooled)
        self._current[kind] = min(self._limit(kind), max(FLOOR_S, middle + self.mads * deviation))

    def give_up(self, kind: Kind, times: list[float], waited: float, missing: int) -> None:
        """So many were `missing` when they had been waited for so long; `times`, which is emptied, of the others."""
        self.record(kind, [*times, *[waited] * missing])
        times.clear()
