"""Rows of different lengths as one packed sequence, attended row by row.

Padding every row to the longest makes batching slower than serving rows one by one, so rows are laid end to end:
`hidden` is (1, T, d), T the sum of the row lengths. Unmodified Hugging Face models run on that: position ids that
restart at 0 give each row its own positions, and `packed_attention`, registered as an attention implementation,
lets a row attend to itself alone. It learns the row lengths from the attention mask argument, a (1, 1, 1, rows)
integer tensor: 4-dimensional masks reach every attention layer untouched.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "flglm_packed"


def position_ids(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(1, T) int64: 0..n-1 for each row of n tokens."""
    return torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)


def row_mask(lengths: Sequence[int]) -> Tensor:
    """(1, 1, 1, rows) int64 on the CPU: the row lengths, in the shape in which masks travel through models."""
    return torch.tensor(list(lengths), dtype=torch.int64).view(1, 1, 1, -1)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(n, n) bool, True where query i may see key j: j <= i, and i - j < window where there is one."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of one row. query (1, H, n, D), key and value (1, G, n, D), H a multiple of G; (1, H, n, D)."""
    length = query.shape[2]
    if window is not None and length <= window:
        window = None
    if softcap is None:
        mask = None if window is None else causal_mask(length, window, query.device)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap  # Gemma 2
    scores = scores.masked_fill(~causal_mask(length, window, query.device), float("-inf"))
    return F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout) @ value


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, H, T, D), key and value (1, G, T, D) to output (1, T, H, D)."""
    lengths = attention_mask.flatten().tolist()
    outputs = [
        attend_row(q, k, v, scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap)
        for q, k, v in zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, packed_attention)
