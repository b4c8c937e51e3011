"""Text, token by token: head and tail here with caches of their own, the trunk at the server with its."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.model.kv_cache import RowCache
from shared.model.methods.prompt import virtual_ids
from worker_client.head_tail import HeadTail
from worker_client.remote_trunk import RemoteTrunk


@torch.no_grad()
def generate(
    parts: HeadTail,
    trunk: RemoteTrunk,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """New token ids for each prompt, the end token, where one came, included.

    Greedy, or with a `temperature` above zero sampled, from `seed`. All rows go on until the last has ended. Raises
    ValueError for a prompt without tokens, Refused if the server has no room or a row becomes too long for the model.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    parts.train_mode(False)
    heads, tails = ([RowCache() for _ in prompts] for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    generated: list[list[int]] = [[] for _ in prompts]
    first = virtual_ids(trunk.job.prompt_tokens)
    rows: list[list[int]] = [[*first, *prompt] for prompt in prompts]
    stream = trunk.link.next_request()
    try:
        for _ in range(max_new_tokens):
            lengths = [len(row) for row in rows]
            ids = torch.tensor([token for row in rows for token in row])
            hidden = trunk.generate(parts.head.embed(ids, lengths, caches=heads), lengths, stream)
            last = torch.tensor(lengths).cumsum(0) - 1
            chosen = _choose(parts.tail.logits(hidden, lengths, last, tails), temperature, generator)
            for row, token in zip(generated, chosen, strict=True):
                if not row or row[-1] != eos_token_id:
                    row.append(token)
            if all(row[-1] == eos_token_id for row in generated):
                break
            rows = [[token] for token in chosen]
    finally:
        trunk.release(stream)
    return generated


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    """The next token of each row from logits (rows, vocabulary)."""
    if temperature <= 0:
        return logits.argmax(-1).tolist()
    probabilities = torch.softmax(logits.float() / temperature, -1)
    return torch.multinomial(probabilities, 1, generator=generator).flatten().tolist()
