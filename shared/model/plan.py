"""Which blocks lie where."""

from dataclasses import dataclass
from typing import Literal

from shared.errors import JobError

PartName = Literal["head", "trunk", "tail"]


@dataclass(frozen=True)
class SplitPlan:
    """A model of `total_blocks` blocks: the first `head_blocks` and last `tail_blocks` at the client."""

    head_blocks: int
    tail_blocks: int
    total_blocks: int

    def __post_init__(self) -> None:
        if self.head_blocks < 1 or self.tail_blocks < 1:
            raise JobError("split.head_blocks and split.tail_blocks must be at least 1")
        if self.head_blocks + self.tail_blocks >= self.total_blocks:
            raise JobError(
                f"split.head_blocks={self.head_blocks} and split.tail_blocks={self.tail_blocks} leave no trunk: "
                f"the model has {self.total_blocks} blocks",
                hint=f"their sum must be at most {self.total_blocks - 1}",
            )

    def blocks(self, part: PartName) -> range:
        """Indices, in the whole model, of the blocks of `part`."""
        if part == "head":
            return range(self.head_blocks)
        if part == "trunk":
            return range(self.head_blocks, self.total_blocks - self.tail_blocks)
        return range(self.total_blocks - self.tail_blocks, self.total_blocks)
