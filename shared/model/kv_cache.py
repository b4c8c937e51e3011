"""Keys and values of one row, layer by layer: what attention keeps of the tokens before, so that they run once.

The cache lives where attention is ours (shared/model/packing.py); transformers' own caches are not used. Rows of many
clients, each with its own cache and of any length, share a forward.
"""

import torch
from torch import Tensor

FIRST_CAPACITY = 64


class RowCache:
    """One row in one part of a model. Memory grows by doubling; what is there is not copied otherwise."""

    def __init__(self) -> None:
        self._slabs: dict[int, tuple[Tensor, Tensor]] = {}
        self._filled: dict[int, int] = {}
        self._virtual = 0

    @property
    def length(self) -> int:
        """How many tokens are kept, those of a prefix not counted."""
        return max(self._filled.values(), default=self._virtual) - self._virtual

    def append(
        self, layer: int, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keep key and value (1, G, n, D) of n more tokens; all that is kept of that layer, (1, G, m, D) each.

        The `prefix`, key and value of virtual tokens, is kept before the first of them.
        """
        if prefix is not None and layer not in self._filled:
            self._virtual = prefix[0].shape[2]
            key, value = (torch.cat(pair, 2) for pair in zip(prefix, (key, value), strict=True))
        filled = self._filled.get(layer, 0)
        stop = filled + key.shape[2]
        if layer not in self._slabs or stop > self._slabs[layer][0].shape[2]:
            self._grow(layer, key, max(FIRST_CAPACITY, stop, 2 * filled))
        keys, values = self._slabs[layer]
        keys[:, :, filled:stop] = key
        values[:, :, filled:stop] = value
        self._filled[layer] = stop
        return keys[:, :, :stop], values[:, :, :stop]

    def _grow(self, layer: int, like: Tensor, capacity: int) -> None:
        shape = (*like.shape[:2], capacity, like.shape[3])
        larger = like.new_empty(shape), like.new_empty(shape)
        filled = self._filled.get(layer, 0)
        if filled:
            for new, old in zip(larger, self._slabs[layer], strict=True):
                new[:, :, :filled] = old[:, :, :filled]
        self._slabs[layer] = larger
