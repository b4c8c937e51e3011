"""Each client's tokens through that client's own LoRA weights, inside one packed forward of the trunk.

The frozen linear stays one product over all tokens; only the two low-rank ones differ by client. Tokens are cut into
tiles, each of one client alone, and the tiles go through one batched product: no loop over clients in a layer. Clients
with equally many tokens are a tile each, and nothing is copied; else tiles hold TILE tokens and the last one of each
client is filled up with zeros.

T tokens, c clients in the cohort, r the rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.errors import JobError
from shared.model.carve import Part
from shared.model.methods.lora import ADAPTER

TILE = 32


@dataclass(frozen=True)
class Tiling:
    """`owners` (tiles,): whose each tile is, None where tile i is client i's.

    `places` (T,): where each token lies in the tiles end to end, None where they are full and in order.
    """

    tiles: int
    size: int
    owners: Tensor | None = None
    places: Tensor | None = None

    def cut(self, packed: Tensor) -> Tensor:
        """(T, n) to (tiles, size, n)."""
        if self.places is not None:
            empty = packed.new_zeros(self.tiles * self.size, packed.shape[1])
            packed = empty.index_copy(0, self.places, packed)
        return packed.view(self.tiles, self.size, -1)

    def join(self, tiles: Tensor) -> Tensor:
        """(tiles, size, n) to (T, n)."""
        packed = tiles.flatten(0, 1)
        return packed if self.places is None else packed.index_select(0, self.places)

    def weights(self, by_client: Tensor) -> Tensor:
        """(c, ...) to (tiles, ...)."""
        return by_client if self.owners is None else by_client.index_select(0, self.owners)


def tiling(tokens: Sequence[int], device: torch.device | str = "cpu") -> Tiling:
    """The tiles of clients that have so many tokens each, end to end."""
    if len(set(tokens)) == 1:
        return Tiling(len(tokens), tokens[0])
    counts = [-(-n // TILE) for n in tokens]
    starts = accumulate(counts, initial=0)
    places = torch.cat([torch.arange(n) + start * TILE for n, start in zip(tokens, starts, strict=False)])
    owners = torch.arange(len(tokens)).repeat_interleave(torch.tensor(counts))
    return Tiling(sum(counts), TILE, owners.to(device), places.to(device))


class Routing:
    """What the layers of one trunk read in a forward: whose tokens lie where, and each client's weights, by layer.

    `weights`: A (c, r x in) and B (c, out x r) of each layer in turn, or its prefix's keys and values, (c, n x G x D)
    each. `row_owners` (rows,) int64: whose each row is.
    """

    def __init__(self) -> None:
        self.tiling = Tiling(0, 0)
        self.row_owners = torch.empty(0, dtype=torch.int64)
        self.weights: tuple[Tensor, ...] = ()

    def set(self, lengths: Sequence[Sequence[int]], weights: tuple[Tensor, ...], device: torch.device) -> None:
        """The next forward is of rows of `lengths` tokens, by client."""
        self.tiling = tiling([sum(rows) for rows in lengths], device)
        owners = [client for client, rows in enumerate(lengths) for _ in rows]
        self.row_owners = torch.tensor(owners, device=device)
        self.weights = weights


class PerClientLora(nn.Module):
    """A frozen linear layer and, beside it, the low-rank weights of whoever's tokens come, from `routing`."""

    def __init__(self, layer: Any, routing: Routing, index: int) -> None:
        super().__init__()
        self.base_layer = layer.get_base_layer()
        self.lora_dropout = layer.lora_dropout[ADAPTER]
        self.scaling: float = layer.scaling[ADAPTER]
        self.r: int = layer.r[ADAPTER]
        self.routing = routing
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, in) to (1, T, out)."""
        base: Tensor = self.base_layer(x)
        tiling = self.routing.tiling
        a, b = self.routing.weights[2 * self.index : 2 * self.index + 2]
        a = tiling.weights(a.view(len(a), self.r, -1))
        b = tiling.weights(b.view(len(b), -1, self.r))
        tiles = tiling.cut(self.lora_dropout(x.flatten(0, -2).to(a.dtype)))
        delta = tiling.join(torch.bmm(torch.bmm(tiles, a.mT) * self.scaling, b.mT))
        return base + delta.view(base.shape).to(base.dtype)


def take_adapters(part: Part, routing: Routing) -> dict[str, Tensor]:
    """Put a PerClientLora, in place, where peft's LoRA layers are; what these held, A and B in turn, by global name.

    Raises JobError if one is neither of a linear layer nor of GPT-2's transposed one.
    """
    taken: dict[str, Tensor] = {}
    layers = [(name, layer) for name, layer in part.module.named_modules() if isinstance(layer, LoraLayer)]
    for index, (name, layer) in enumerate(layers):
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            raise JobError(f"method.target_modules: {name} is no linear layer; cohort.adapters=per_client needs those")
        for factor in ("lora_A", "lora_B"):
            weight = getattr(layer, factor)[ADAPTER].weight
            taken[part.global_name(f"{name}.{factor}.{ADAPTER}.weight")] = weight.detach()
        part.module.set_submodule(name, PerClientLora(layer, routing, index))
    return taken
