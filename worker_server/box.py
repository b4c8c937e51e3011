"""The averages as the server has them under a group's key: a box that it keeps, hands out and cannot open."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.wire.envelope import Frame

SEALED = "sealed/"


@dataclass(frozen=True)
class Box:
    """`round`: the one that begins with these averages, first; later ones, too, whose rounds before had no sum."""

    round: int
    frame: Frame = field(repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {f"{SEALED}{self.round}": torch.frombuffer(bytearray(self.frame), dtype=torch.uint8)}


def box_in(tensors: Mapping[str, Tensor]) -> Box | None:
    """The box in a checkpoint, if it has one."""
    for name, value in tensors.items():
        if name.startswith(SEALED):
            return Box(int(name.removeprefix(SEALED)), value.numpy().tobytes())
    return None
