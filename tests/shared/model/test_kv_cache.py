"""Generation with row caches, against transformers' own, for every family; and the cache by itself."""

from pathlib import Path

import pytest
import torch

from benchmarks.plain import load_plain
from benchmarks.tiny_models import save_tiny_model
from shared.model.carve import load_head_and_tail, load_part
from shared.model.checkpoint import Checkpoint
from shared.model.families import FAMILIES
from shared.model.kv_cache import FIRST_CAPACITY, RowCache
from shared.model.plan import SplitPlan

PROMPTS = [[5, 9, 2, 44], [7], [3, 3, 8, 60, 61, 62, 63, 12, 13, 14, 15]]
NEW_TOKENS = 12


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_go_on_as_in_transformers(family: str, tmp_path: Path) -> None:
    """Logits of every step, rows of different lengths in one forward; past the windows of 6 tokens that some have."""
    folder = save_tiny_model(family, tmp_path / "model")
    checkpoint, plan = Checkpoint(str(folder)), SplitPlan(1, 1, 4)
    head, tail = load_head_and_tail(checkpoint, plan)
    trunk = load_part(checkpoint, plan, "trunk")
    for part in (head, trunk, tail):
        part.module.eval()
    plain = load_plain(str(folder)).eval()
    caches = [[RowCache() for _ in PROMPTS] for _ in range(3)]
    rows, whole = [list(prompt) for prompt in PROMPTS], [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW_TOKENS):
        lengths = [len(row) for row in rows]
        ids = torch.tensor([token for row in rows for token in row])
        hidden = trunk.forward(head.embed(ids, lengths, caches=caches[0]), lengths, caches=caches[1])
        logits = tail.logits(hidden, lengths, torch.tensor(lengths).cumsum(0) - 1, caches[2])
        for row, mine in zip(whole, logits, strict=True):
            expected = plain(input_ids=torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        rows = [[int(token)] for token in logits.argmax(-1)]
        for row, new in zip(whole, rows, strict=True):
            row += new
    assert [cache.length for cache in caches[1]] == [len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_several_new_tokens_at_once_see_those_before_and_not_those_after(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / "model")
    trunk = load_part(Checkpoint(str(folder)), SplitPlan(1, 1, 4), "trunk")
    trunk.module.eval()
    hidden = torch.randn(20, 32)
    cache = RowCache()
    pieces = [trunk.forward(piece, [len(piece)], caches=[cache]) for piece in torch.split(hidden, [7, 5, 1, 7])]
    torch.testing.assert_close(torch.cat(pieces), trunk.forward(hidden, [20]), rtol=1e-4, atol=1e-5)


def test_a_cache_keeps_what_came_and_grows_without_copying_at_every_token() -> None:
    cache = RowCache()
    keys = torch.randn(1, 2, 3 * FIRST_CAPACITY, 4)
    places = set()
    for start in range(3 * FIRST_CAPACITY):
        piece = keys[:, :, start : start + 1]
        kept, values = cache.append(0, piece, -piece)
        places.add(kept.data_ptr())
    assert torch.equal(kept, keys)
    assert torch.equal(values, -keys)
    assert cache.length == 3 * FIRST_CAPACITY
    assert len(places) == 3
