"""Private rows from JSONL files, tokenized, with the tokens that count in the loss marked.

Three shapes, told apart by their keys: {"text"} (every token counts), {"prompt", "completion"} (the completion and the
end token count), {"messages": [{"role", "content"}, ...]} (the tokenizer's chat template; what the assistant says
counts).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError

from shared.errors import DataError

EXPECTED = '{"text"}, {"prompt", "completion"} or {"messages"}'


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
    path: Path, tokenizer: Any, *, max_length: int, too_long: Literal["truncate", "skip"] = "truncate"
) -> LoadedRows:
    """Read and tokenize a JSONL file. Raises DataError naming file, line and reason; no usable row is an error too."""
    rows: list[Row] = []
    truncated = skipped = empty = 0
    for line, record in read_jsonl(path):
        try:
            row = tokenize(record, tokenizer)
        except DataError as error:
            raise DataError(f"{path}:{line}: {error.message}", hint=error.hint) from None
        if len(row.input_ids) > max_length:
            if too_long == "skip":
                skipped += 1
                continue
            truncated += 1
            row = Row(row.input_ids[:max_length], row.counts[:max_length])
        if row.target_tokens == 0:
            empty += 1
            continue
        rows.append(row)
    if not rows:
        raise DataError(
            f"{path}: no usable row ({skipped} longer than {max_length} tokens, {empty} without a token that counts)"
        )
    return LoadedRows(tuple(rows), truncated, skipped, empty)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects. Blank lines are passed over. Raises DataError."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: not JSON ({error}); expected {EXPECTED}") from None
                if not isinstance(record, dict):
                    raise DataError(f"{path}:{number}: not a JSON object; expected {EXPECTED}")
                yield number, record
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint="name the file with --data") from None


def tokenize(record: dict[str, Any], tokenizer: Any) -> Row:
    """One record to a Row. Raises DataError."""
    if "messages" in record:
        return _messages(record["messages"], tokenizer)
    if "prompt" in record and "completion" in record:
        prompt = _ids(tokenizer, _text(record, "prompt"))
        completion = [*_ids(tokenizer, _text(record, "completion"), add_special_tokens=False), _end_token(tokenizer)]
        return Row((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion))
    if "text" in record:
        ids = [*_ids(tokenizer, _text(record, "text")), _end_token(tokenizer)]
        return Row(tuple(ids), (True,) * len(ids))
    raise DataError(f"keys {sorted(record)[:6]}; expected {EXPECTED}")


def _messages(messages: Any, tokenizer: Any) -> Row:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    ):
        raise DataError('"messages" must be a list of {"role", "content"} with text in both')
    if not tokenizer.chat_template:
        raise DataError('the tokenizer has no chat template for {"messages"}', hint="use {prompt, completion} rows")
    if messages[0]["role"] == "assistant":
        raise DataError("the assistant speaks first, and answers nobody", hint="begin with a message of another role")
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


def _text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f'"{key}" must be text, not {type(value).__name__}')
    return value


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
