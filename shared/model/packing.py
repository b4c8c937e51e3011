"""Rows of different lengths as one packed sequence, attended row by row.

Padding every row to the longest makes batching slower than serving rows one by one, so rows are laid end to end:
`hidden` is (1, T, d), T the sum of the row lengths. Unmodified Hugging Face models run on that: position ids that
restart at 0 give each row its own positions, and `packed_attention`, registered as an attention implementation,
lets a row attend to itself alone. It learns the row lengths from the attention mask argument, a (1, 1, 1, rows)
integer tensor: 4-dimensional masks reach every attention layer untouched. Where rows go on from tokens before, their
caches travel with the mask. Where the attention module has a prefix (shared/model/methods/prefix.py), a row attends to
that before itself. On CUDA one variable-length kernel attends all rows, where it can; elsewhere each row is a
call of its own, which costs a CPU little.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nested import nested_tensor_from_jagged
from transformers import AttentionInterface

from shared.model.kv_cache import RowCache

IMPLEMENTATION = "flglm_packed"
# The attribute of an attention module under which its prefix lies.
PREFIX = "prefix"


def position_ids(
    lengths: Sequence[int],
    device: torch.device | str = "cpu",
    caches: Sequence[RowCache] | None = None,
    first: int = 0,
) -> Tensor:
    """(1, T) int64: `first` and on for each row, or on from where its cache ends."""
    starts = [first] * len(lengths) if caches is None else [first + cache.length for cache in caches]
    positions = [place for start, n in zip(starts, lengths, strict=True) for place in range(start, start + n)]
    return torch.tensor([positions], device=device)


def row_mask(
    lengths: Sequence[int], device: torch.device | str = "cpu", caches: Sequence[RowCache] | None = None
) -> Tensor:
    """(1, 1, 1, rows) int64 on the CPU: the row lengths, in the shape in which masks travel through models.

    With it travel the caches and, made once for all layers, `offsets`, (rows + 1,) int64 on `device`: where rows begin.
    """
    mask = torch.tensor(list(lengths), dtype=torch.int64).view(1, 1, 1, -1)
    mask.caches = caches  # type: ignore[attr-defined]
    mask.offsets = torch.tensor(list(accumulate(lengths, initial=0)), device=device)  # type: ignore[attr-defined]
    return mask


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(n, m) bool, True where query i, which is token m - n + i, may see key j: none that comes after it, and with a
    window none that is so far before."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries + 1 - window)


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
    """Causal attention of a row's last n tokens to all its m tokens.

    query (1, H, n, D), key and value (1, G, m, D), H a multiple of G; to (1, H, n, D).
    """
    queries, keys = query.shape[2], key.shape[2]
    if window is not None and keys <= window:
        window = None
    if softcap is None:
        plain = window is None and queries in (1, keys)
        mask = None if plain else causal_mask(queries, keys, window, query.device)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=plain and queries > 1,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap  # Gemma 2
    scores = scores.masked_fill(~causal_mask(queries, keys, window, query.device), float("-inf"))
    return F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout) @ value


def attend_together(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    offsets: Tensor,
    *,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """All rows, each to itself alone and causally, in one variable-length kernel: CUDA only, as torch has no other.

    query (1, H, T, D), key and value (1, G, T, D), H a multiple of G; to (1, H, T, D). Half precision takes
    FlashAttention-2 (arXiv 2307.08691), float32 the memory-efficient kernel.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

    def nested(x: Tensor) -> Tensor:
        rows = x[0].transpose(0, 1).contiguous()
        jagged = nested_tensor_from_jagged(rows, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths))
        return jagged.transpose(1, 2)

    output = F.scaled_dot_product_attention(
        nested(query), nested(key), nested(value), is_causal=True, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).values().transpose(0, 1).unsqueeze(0)


def with_prefix(prefix: Tensor, packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows (1, G, T, D) of `lengths` tokens, each with its own (G, n, D) of `prefix` (rows, G, n, D) before it."""
    rows = torch.split(packed, list(lengths), 2)
    return torch.cat([piece for pair in zip(torch.split(prefix, 1), rows, strict=True) for piece in pair], 2)


def without_prefix(packed: Tensor, virtual: int, lengths: Sequence[int]) -> Tensor:
    """Rows (1, H, T, D) of `lengths` tokens, from the same with `virtual` more before each."""
    rows = torch.split(packed, [virtual + length for length in lengths], 2)
    return torch.cat([row[:, :, virtual:] for row in rows], 2)


def attend_together_with_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    offsets: Tensor,
    *,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """As `attend_together`, with a `prefix` of keys and values, (rows, G, n, D) each.

    The kernel's causality wants as many queries as keys: the virtual tokens get some, whose outputs are dropped.
    """
    rows, _, virtual, width = prefix[0].shape
    queries = query.new_zeros(rows, query.shape[1], virtual, width)
    longer = [virtual + length for length in lengths]
    output = attend_together(
        with_prefix(queries, query, lengths),
        with_prefix(prefix[0], key, lengths),
        with_prefix(prefix[1], value, lengths),
        longer,
        offsets + virtual * torch.arange(rows + 1, device=offsets.device),
        scaling=scaling,
        dropout=dropout,
    )
    return without_prefix(output, virtual, lengths)


def packed_attention(
    module: Any,
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
    caches: Sequence[RowCache] | None = attention_mask.caches  # type: ignore[attr-defined]
    prefix = _prefix_of(module, len(lengths), key.dtype)
    longest = max(lengths) + (0 if prefix is None else prefix[0].shape[2])
    windowed = sliding_window is not None and longest > sliding_window
    if query.is_cuda and caches is None and softcap is None and not windowed:
        offsets: Tensor = attention_mask.offsets  # type: ignore[attr-defined]
        settings: dict[str, Any] = {"scaling": scaling, "dropout": dropout}
        if prefix is None:
            together = attend_together(query, key, value, lengths, offsets, **settings)
        else:
            together = attend_together_with_prefix(query, key, value, prefix, lengths, offsets, **settings)
        return together.transpose(1, 2).contiguous(), None
    rows = zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True)
    before: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(lengths)
    if prefix is not None:
        before = list(zip(torch.split(prefix[0], 1), torch.split(prefix[1], 1), strict=True))
    outputs = []
    for place, (q, k, v) in enumerate(rows):
        if caches is not None:
            k, v = caches[place].append(module.layer_idx, k, v, before[place])
        elif (own := before[place]) is not None:
            k, v = torch.cat((own[0], k), 2), torch.cat((own[1], v), 2)
        outputs.append(attend_row(q, k, v, scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _prefix_of(module: Any, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Keys and values (rows, G, n, D) that come before each row's, if the module has any."""
    prefix = getattr(module, PREFIX, None)
    if prefix is None:
        return None
    keys, values = prefix.of_rows(rows)
    return keys.to(dtype), values.to(dtype)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
