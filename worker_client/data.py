"""Private rows from files, tokenized, with the tokens that count in the loss marked.

A text counts whole; of a prompt and its completion the completion and the end token count; of a conversation, in the
tokenizer's chat template, what the assistant says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError

from shared.errors import DataError
from worker_client.record_files import read_records
from worker_client.shapes import Chat, Content, Pair, recognise

TooLong = Literal["truncate", "skip"]


@dataclass(frozen=True)
class Row:
    """Token ids, and for each token whether it counts in the loss when it is predicted (never the first)."""

    input_ids: tuple[int, ...]
    counts: tuple[bool, ...]

    @property
    def target_tokens(self) -> int:
        return sum(self.counts[1:])


@dataclass(frozen=True)
class LoadedRows:
    """The usable rows, and how many were cut or left out for their length, or had no token that counts."""

    rows: tuple[Row, ...]
    truncated: int
    skipped_long: int
    without_target: int


def load_rows(
    path: Path, tokenizer: Any, *, max_length: int, too_long: TooLong = "truncate", limit: int | None = None
) -> LoadedRows:
    """Read and tokenize a file, or its first `limit` records.

    Raises DataError naming file, line and reason; no usable row is an error too.
    """
    rows: list[Row] = []
    truncated = skipped = empty = 0
    for line, record in islice(read_records(path), limit):
        try:
            row = tokenize(record, tokenizer)
        except DataError as error:
            raise DataError(f"{path}:{line}: {error.message}", hint=error.hint) from None
        fitted = fit(row, max_length, too_long)
        if fitted is None:
            skipped += 1
            continue
        truncated += len(fitted.input_ids) < len(row.input_ids)
        if fitted.target_tokens == 0:
            empty += 1
            continue
        rows.append(fitted)
    if not rows:
        raise no_usable_row(path, max_length, skipped, empty)
    return LoadedRows(tuple(rows), truncated, skipped, empty)


def fit(row: Row, max_length: int, too_long: TooLong) -> Row | None:
    """The row, cut if it is too long; None if it is left out instead."""
    if len(row.input_ids) <= max_length:
        return row
    return None if too_long == "skip" else Row(row.input_ids[:max_length], row.counts[:max_length])


def no_usable_row(path: Path, max_length: int, skipped_long: int, without_target: int) -> DataError:
    return DataError(
        f"{path}: no usable row ({skipped_long} longer than {max_length} tokens, {without_target} without a token that "
        "counts)"
    )


def tokenize(record: dict[str, Any], tokenizer: Any) -> Row:
    """One record to a Row. Raises DataError."""
    return tokenize_content(recognise(record).read(record), tokenizer)


def tokenize_content(content: Content, tokenizer: Any) -> Row:
    """What a record says to a Row. Raises DataError."""
    if isinstance(content, Chat):
        return _messages(content.messages, tokenizer)
    if isinstance(content, Pair):
        prompt = _ids(tokenizer, content.prompt)
        completion = [*_ids(tokenizer, content.completion, add_special_tokens=False), _end_token(tokenizer)]
        return Row((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion))
    ids = [*_ids(tokenizer, content.text), _end_token(tokenizer)]
    return Row(tuple(ids), (True,) * len(ids))


def _messages(messages: list[dict[str, Any]], tokenizer: Any) -> Row:
    if not tokenizer.chat_template:
        raise DataError('the tokenizer has no chat template for {"messages"}', hint="use {prompt, completion} rows")
    ids: list[int] = []
    counts: list[bool] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            _extend(ids, counts, _template(tokenizer, messages[:index], add_generation_prompt=True), counted=False)
            _extend(ids, counts, _template(tokenizer, messages[: index + 1]), counted=True)
    return Row(tuple(ids), tuple(counts))


def _template(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses these messages ({error})") from None
    return _ids(tokenizer, text, add_special_tokens=False)


def _ids(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("half of a surrogate pair (\\ud800 to \\udfff) is no text") from None
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
    return ids


def _extend(ids: list[int], counts: list[bool], longer: list[int], *, counted: bool) -> None:
    """Append what `longer` has beyond `ids`. A template that rewrites earlier turns cannot be marked turn by turn."""
    if longer[: len(ids)] != ids:
        raise DataError("the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart")
    counts.extend([counted] * (len(longer) - len(ids)))
    ids.extend(longer[len(ids) :])


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token", hint="set eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def split_validation(rows: Sequence[Row], fraction: float, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Training and validation rows, drawn by `seed`; at least one of each. Raises DataError for one row."""
    if len(rows) < 2:
        raise DataError("one row cannot be split into training and validation rows", hint="give --validation a file")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(len(rows) - 1, max(1, round(fraction * len(rows))))
    chosen = set(order[:held_out])
    return (
        tuple(row for index, row in enumerate(rows) if index not in chosen),
        tuple(row for index, row in enumerate(rows) if index in chosen),
    )
