"""What a client carries from round to round beside its parameters, and takes over only if its update counted.

Whether it did the server alone knows, and a client may be killed before it hears. So its checkpoint keeps both: what it
carried into the round, and what it carries on if the update counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from shared.prefixes import under

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Carried:
    """By name, float32; empty before the first round, and where the job has no use for it.

    `control`: SCAFFOLD's control variate of this client, c_i. `unsent`: what is left of this client's differences.
    """

    control: Tensors = field(default_factory=dict)
    unsent: Tensors = field(default_factory=dict)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """As a checkpoint holds them."""
        return {
            f"{prefix}{kind}/{name}": value
            for kind, values in (("control", self.control), ("unsent", self.unsent))
            for name, value in values.items()
        }

    @property
    def finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.tensors().values())


def carried_in(checkpoint: Tensors, prefix: str = "") -> Carried:
    """What `tensors` with this prefix put into a checkpoint."""
    return Carried(under(f"{prefix}control/", checkpoint), under(f"{prefix}unsent/", checkpoint))
