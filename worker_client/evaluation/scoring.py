"""Log-likelihoods: how probable a model finds the tokens of a row that count, and which of some options most."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import DataError, ModelError
from worker_client.batches import Batch
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
        batch = _packed(chunk)
        if not batch.target_tokens:
            found += [Likelihood(0.0, 0, True)] * len(chunk)
            continue
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
    """The rows in their order, at most BATCH_TOKENS tokens to compute at once, or one row."""
    chunk: list[Row] = []
    computed: set[tuple[int, ...]] = set()
    tokens = 0
    for row in rows:
        more = 0 if row.input_ids[:-1] in computed else len(row.input_ids) - 1
        if chunk and tokens + more > BATCH_TOKENS:
            yield chunk
            chunk, computed, tokens, more = [], set(), 0, len(row.input_ids) - 1
        chunk.append(row)
        computed.add(row.input_ids[:-1])
        tokens += more
    if chunk:
        yield chunk


def _packed(rows: Sequence[Row]) -> Batch:
    """Rows without their last tokens, which predict nothing; those that are the same then are computed once: options of
    one token cost no more than their prompt.
    """
    ids: list[int] = []
    at: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    starts: dict[tuple[int, ...], int] = {(): 0}
    lengths: list[int] = []
    for index, row in enumerate(rows):
        fed = row.input_ids[:-1]
        if fed not in starts:
            starts[fed] = len(ids)
            ids += fed
            lengths.append(len(fed))
        for place in range(len(fed)):
            if row.counts[place + 1]:
                at.append(starts[fed] + place)
                targets.append(row.input_ids[place + 1])
                owner.append(index)
    return Batch(
        torch.tensor(ids), tuple(lengths), *(torch.tensor(each, dtype=torch.int64) for each in (at, targets, owner))
    )


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


def choose(
    model: Logits, tokenizer: Any, examples: Sequence[Example], *, context: int, per_token: bool
) -> list[Choice]:
    """For each the option of largest log-likelihood given the prompt, summed or the mean of its tokens; of equals the
    first.

    Raises DataError if an option has no token of its own, ModelError as `likelihoods` does.
    """
    rows = [
        [option_row(tokenizer, example.prompt, option, context) for option in example.options.values()]
        for example in examples
    ]
    scored = iter(likelihoods(model, [row for options in rows for row, _ in options]))
    choices: list[Choice] = []
    for example, options in zip(examples, rows, strict=True):
        found = dict(zip(example.options, scored, strict=False))
        if not all(each.tokens for each in found.values()):
            raise DataError("an option has no token that could be scored")
        scores = {name: each.log_probability / (each.tokens if per_token else 1) for name, each in found.items()}
        choices.append(Choice(max(scores, key=lambda name: scores[name]), any(cut for _, cut in options)))
    return choices
