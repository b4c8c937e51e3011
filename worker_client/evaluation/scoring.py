"""Log-likelihoods: how probable a model finds the tokens of a row that count, and which of some options most."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import DataError, ModelError
from worker_client.batches import Batch, pack_rows
from worker_client.data import Row
from worker_client.evaluation.cases import Example

# From a batch to float logits (P, vocabulary) at its positions `at`.
Logits = Callable[[Batch], Tensor]

# Of a forward; a longer row goes alone.
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Likelihood:
    """Of the tokens that count in one row: the sum of their log-probabilities (nats), how many, whether each was the
    most probable one."""

    log_probability: float
    tokens: int
    greedy: bool


def likelihoods(model: Logits, rows: Sequence[Row]) -> list[Likelihood]:
    """One a row. Raises ModelError if the model's scores are not finite."""
    found: list[Likelihood] = []
    for chunk in in_batches(rows):
        batch = pack_rows(chunk)
        logits = model(batch)
        loss = F.cross_entropy(logits, batch.targets, reduction="none").double()
        wrong = (logits.argmax(-1) != batch.targets).double()
        sums = torch.zeros(len(chunk), 3, dtype=torch.float64)
        sums.index_add_(0, batch.row, torch.stack([loss, wrong, torch.ones_like(loss)], 1))
        for summed, missed, tokens in sums.tolist():
            if not math.isfinite(summed):
                raise ModelError("the model gives scores that are not finite")
            found.append(Likelihood(-summed, int(tokens), missed == 0))
    return found


def in_batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows in their order, cut to at most BATCH_TOKENS tokens."""
    chunk: list[Row] = []
    tokens = 0
    for row in rows:
        if chunk and tokens + len(row.input_ids) > BATCH_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(row)
        tokens += len(row.input_ids)
    if chunk:
        yield chunk


def option_row(tokenizer: Any, prompt: str, option: str, context: int) -> tuple[Row, bool]:
    """The prompt and how it goes on, tokenized as one text; the tokens count from where they are no longer the prompt's
    own. Cut at the beginning to `context` tokens; and whether it was.
    """
    whole = tokenizer(prompt + option).input_ids
    begin = 0
    for mine, other in zip(tokenizer(prompt).input_ids, whole, strict=False):
        if mine != other:
            break
        begin += 1
    cut = max(0, len(whole) - context)
    counts = (place >= begin for place in range(cut, len(whole)))
    return Row(tuple(whole[cut:]), tuple(counts)), cut > 0


@dataclass(frozen=True)
class Choice:
    """The chosen option's name, and whether any option's row was cut."""

    name: str
    cut: bool


def choose(model: Logits, tokenizer: Any, example: Example, *, context: int, per_token: bool) -> Choice:
    """The option of largest log-likelihood given the prompt, summed or the mean of its tokens; of equals the first.

    Raises DataError if an option has no token of its own, ModelError as `likelihoods` does.
    """
    rows = [option_row(tokenizer, example.prompt, option, context) for option in example.options.values()]
    scored = likelihoods(model, [row for row, _ in rows])
    if not all(each.tokens for each in scored):
        raise DataError("an option has no token that could be scored")
    scores = [each.log_probability / each.tokens if per_token else each.log_probability for each in scored]
    best = max(range(len(scores)), key=lambda place: scores[place])
    return Choice(list(example.options)[best], any(cut for _, cut in rows))
