"""What clients are told after a round: the averages, or as much of the way there as the job lets travel.

With `wire.average` and `wire.average_density`, what all clients hold moves by part of its difference to the averages
(shared/error_feedback.py); the server keeps the rest, and adds it to the next difference. All begin the next round from
what they were told, and the server with them, so that differences mean the same at both ends.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from shared.error_feedback import Compressed, compress
from shared.job import Wire
from shared.logs import event

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """`values` that all go on from, by name; `unsent`: what is still to come; `change`: what goes to those who hold
    what the round began with, if not the values themselves.
    """

    values: dict[str, Tensor]
    unsent: dict[str, Tensor] = field(default_factory=dict)
    change: Compressed | None = None


def tell(wire: Wire, start: Mapping[str, Tensor], averages: dict[str, Tensor], unsent: Mapping[str, Tensor]) -> Told:
    """From what the round began with and what was left untold then."""
    if not wire.compresses_averages:
        return Told(averages)
    difference = {name: value - start[name].to(value.device) for name, value in averages.items()}
    change = compress(difference, unsent, wire.average_density, wire.average)
    if not change.sent:
        event(logger, "averages_overflowed", level=logging.WARNING, format=wire.average)
        return Told(dict(start), dict(unsent))
    return Told({name: start[name].cpu() + sent for name, sent in change.sent.items()}, change.unsent, change)
