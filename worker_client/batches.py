"""Which rows a step takes, and rows as one packed batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.model.methods.prompt import virtual_ids
from worker_client.data import Row


@dataclass(frozen=True)
class Batch:
    """Rows end to end: input_ids (T,) int64; at (P,) int64, positions that predict a token that counts; targets (P,)
    int64, those tokens; row (P,) int64, which row each belongs to."""

    input_ids: Tensor
    lengths: tuple[int, ...]
    at: Tensor
    targets: Tensor
    row: Tensor

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def target_tokens(self) -> int:
        return len(self.targets)


def pack_rows(rows: Sequence[Row], prompt_tokens: int = 0) -> Batch:
    """`prompt_tokens` virtual tokens come before those of each row; of them none counts."""
    ids: list[int] = []
    at: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for index, row in enumerate(rows):
        ids.extend(virtual_ids(prompt_tokens))
        for position in range(len(row.input_ids) - 1):
            if row.counts[position + 1]:
                at.append(len(ids) + position)
                targets.append(row.input_ids[position + 1])
                owner.append(index)
        ids.extend(row.input_ids)
    return Batch(
        torch.tensor(ids),
        tuple(prompt_tokens + len(row.input_ids) for row in rows),
        torch.tensor(at, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(owner, dtype=torch.int64),
    )


def with_virtual_tokens(batch: Batch, prompt_tokens: int) -> Batch:
    """The batch with so many virtual tokens before each of its rows."""
    if not prompt_tokens:
        return batch
    before = torch.tensor(virtual_ids(prompt_tokens))
    ids = torch.cat([piece for row in torch.split(batch.input_ids, list(batch.lengths)) for piece in (before, row)])
    ends = torch.tensor(batch.lengths).cumsum(0)
    at = batch.at + prompt_tokens * (1 + torch.searchsorted(ends, batch.at, right=True))
    return replace(batch, input_ids=ids, lengths=tuple(prompt_tokens + length for length in batch.lengths), at=at)


def batch_indices(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of global step `step` (from 0): epochs are permutations drawn from `seed`, laid end to end.

    A function of its arguments alone, so the data position of a resumed run is its step.
    """
    wanted = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, list[int]] = {}
    indices: list[int] = []
    for place in wanted:
        epoch, offset = divmod(place, rows)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(rows, generator=generator).tolist()
        indices.append(orders[epoch][offset])
    return indices
