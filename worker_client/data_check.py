"""What training would make of a file of rows: counts, lengths, what is cut or left out and why, one row's tokens."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DataError
from worker_client.data import Row, TooLong, fit, no_usable_row, tokenize_content
from worker_client.record_files import read_entries
from worker_client.shapes import recognise

# Bad lines that are named; all are counted.
NAMED_ERRORS = 20
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Token:
    """A token as text, and whether it counts in the loss. The first never does: nothing predicts it."""

    id: int
    text: str
    in_loss: bool


@dataclass(frozen=True)
class Example:
    """A row as it would be trained on."""

    line: int
    shape: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Survey:
    """`rows` = `usable` + `skipped_long` + `without_target` + `bad`. `lengths` and `targets`, in tokens: "min", "mean",
    "max" and percentiles of the rows as they are, before any is cut, and of the tokens that count in usable rows.
    `errors`: the first bad rows as "file:line: reason"; `reasons`: all of them, by reason.
    """

    rows: int
    usable: int
    shapes: dict[str, int]
    max_length: int
    truncated: int
    tokens_cut: int
    skipped_long: int
    without_target: int
    bad: int
    errors: tuple[str, ...]
    reasons: dict[str, int]
    lengths: dict[str, float]
    targets: dict[str, float]
    example: Example | None


def survey(path: Path, tokenizer: Any, *, max_length: int, too_long: TooLong) -> Survey:
    """Look at every row. Raises DataError if the file cannot be read or no row is usable."""
    shapes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    errors: list[str] = []
    lengths: list[int] = []
    targets: list[int] = []
    truncated = tokens_cut = skipped = empty = 0
    example: Example | None = None
    for entry in read_entries(path):
        try:
            if isinstance(entry.record, DataError):
                raise entry.record
            shape = recognise(entry.record)
            row = tokenize_content(shape.read(entry.record), tokenizer)
        except DataError as error:
            reason = error.message.removeprefix(f"{path}:{entry.line}: ")
            reasons[reason] += 1
            if len(errors) < NAMED_ERRORS:
                errors.append(f"{path}:{entry.line}: {reason}")
            continue
        shapes[shape.name] += 1
        lengths.append(len(row.input_ids))
        fitted = fit(row, max_length, too_long)
        if fitted is None:
            skipped += 1
            continue
        cut = len(row.input_ids) - len(fitted.input_ids)
        truncated += cut > 0
        tokens_cut += cut
        if fitted.target_tokens == 0:
            empty += 1
            continue
        targets.append(fitted.target_tokens)
        if example is None:
            example = Example(entry.line, shape.name, shown_tokens(fitted, tokenizer))
    if not targets and not errors:
        raise no_usable_row(path, max_length, skipped, empty)
    return Survey(
        rows=len(lengths) + reasons.total(),
        usable=len(targets),
        shapes=dict(shapes.most_common()),
        max_length=max_length,
        truncated=truncated,
        tokens_cut=tokens_cut,
        skipped_long=skipped,
        without_target=empty,
        bad=reasons.total(),
        errors=tuple(errors),
        reasons=dict(reasons.most_common(NAMED_ERRORS)),
        lengths=distribution(lengths),
        targets=distribution(targets),
        example=example,
    )


def distribution(values: Sequence[int]) -> dict[str, float]:
    """Smallest, mean, largest and percentiles (nearest rank: values that occur); of no values nothing."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in PERCENTILES}
    return {"min": ordered[0], "mean": sum(ordered) / len(ordered)} | ranks | {"max": ordered[-1]}


def shown_tokens(row: Row, tokenizer: Any) -> tuple[Token, ...]:
    """Each token of the row as the tokenizer decodes it alone."""
    return tuple(
        Token(token, tokenizer.decode([token]), counts and place > 0)
        for place, (token, counts) in enumerate(zip(row.input_ids, row.counts, strict=True))
    )
