"""What tasks ask of a model, wherever its parts are."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from worker_client.batches import Batch


class Model(Protocol):
    """`context`: the most tokens of a row of its own, beside the virtual ones of a method."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def context(self) -> int: ...

    def logits(self, batch: Batch) -> Tensor:
        """Float32 logits (P, vocabulary) on the CPU at the batch's positions `at`, of rows without virtual tokens."""
        ...

    def continued(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The most probable next token again and again: `max_new_tokens` new ones, or those before the end token."""
        ...
