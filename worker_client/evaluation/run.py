"""One task on one file with one model."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shared.errors import DataError, UsageError
from worker_client.data import load_rows
from worker_client.evaluation.cases import Answer, Example, render
from worker_client.evaluation.model import Model
from worker_client.evaluation.records import text_in
from worker_client.evaluation.scoring import choose, likelihoods
from worker_client.evaluation.summaries import continuation, rouge
from worker_client.evaluation.tasks import TASKS, ChoiceTask, RowsTask, SummaryTask
from worker_client.record_files import read_records

# Done so far, and of how many.
Progress = Callable[[int, int], None]
# Rows or examples between two reports of progress.
AT_ONCE = 32
LARGEST_LOGARITHM = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Settings:
    """`limit`: of each file only the first records. `max_length`: rows and prompts are cut there, if the model takes as
    many. `max_new_tokens`: of a summary."""

    limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Result:
    """`metrics` by name. `chance`: what a blind choice would get right, for tasks with options. `examples`: decisions,
    summaries or rows. `cut`: how many of them lost tokens to the model's context or `max_length`. `left_out`: rows in
    which, where so cut, no token counts. `tokens`: those that count in the loss of rows."""

    task: str
    file: str
    metrics: dict[str, float]
    examples: int
    cut: int
    seconds: float
    chance: float | None = None
    left_out: int = 0
    tokens: int | None = None


def evaluate(model: Model, task: str, file: Path, settings: Settings, progress: Progress) -> Result:
    """Raises UsageError for an unknown task or a missing library, DataError naming file, line and reason."""
    if task not in TASKS:
        raise UsageError(f"no task '{task}'", hint="tasks: " + ", ".join(TASKS))
    began = time.monotonic()
    chosen = TASKS[task]
    if isinstance(chosen, RowsTask):
        values = _rows(model, file, settings, progress)
    elif isinstance(chosen, ChoiceTask):
        values = _choices(model, chosen, file, settings, progress)
    else:
        values = _summaries(model, chosen, file, settings, progress)
    return Result(task=task, file=str(file), seconds=time.monotonic() - began, **values)


def _context(model: Model, settings: Settings) -> int:
    return min(model.context, settings.max_length or model.context)


def _rows(model: Model, file: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    loaded = load_rows(file, model.tokenizer, max_length=_context(model, settings), limit=settings.limit)
    log_probability, tokens, greedy = 0.0, 0, 0
    for start in range(0, len(loaded.rows), AT_ONCE):
        for each in likelihoods(model.logits, loaded.rows[start : start + AT_ONCE]):
            log_probability += each.log_probability
            tokens += each.tokens
            greedy += each.greedy
        progress(min(len(loaded.rows), start + AT_ONCE), len(loaded.rows))
    loss = -log_probability / tokens
    metrics = {"loss": loss, "accuracy": greedy / len(loaded.rows)}
    if loss < LARGEST_LOGARITHM:
        metrics["perplexity"] = math.exp(loss)
    return {
        "metrics": metrics,
        "examples": len(loaded.rows),
        "cut": loaded.truncated,
        "left_out": loaded.without_target,
        "tokens": tokens,
    }


def _choices(model: Model, task: ChoiceTask, file: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    examples = list(_examples(task, file, settings.limit))
    if not examples:
        raise DataError(f"{file}: no example")
    context = _context(model, settings)
    answers: list[Answer] = []
    cut = 0
    for start in range(0, len(examples), AT_ONCE):
        asked = examples[start : start + AT_ONCE]
        choices = choose(model.logits, model.tokenizer, asked, context=context, per_token=task.per_token)
        answers += [Answer(c.name, e.gold, e.group) for c, e in zip(choices, asked, strict=True)]
        cut += sum(choice.cut for choice in choices)
        progress(len(answers), len(examples))
    chance = sum(example.chance for example in examples) / len(examples)
    return {"metrics": task.metrics(answers), "examples": len(answers), "cut": cut, "chance": chance}


def _examples(task: ChoiceTask, file: Path, limit: int | None) -> Iterator[Example]:
    for line, record in islice(task.records(file), limit):
        try:
            for case in task.cases(record):
                yield render(task.template, case)
        except DataError as error:
            raise DataError(f"{file}:{line}: {error.message}", hint=error.hint) from None


def _summaries(model: Model, task: SummaryTask, file: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    mean_f1 = rouge()
    context = _context(model, settings)
    if settings.max_new_tokens >= context:
        raise UsageError(
            f"--max-new-tokens {settings.max_new_tokens} leaves no room for what is summarised: a row has at most "
            f"{context} tokens"
        )
    pairs: list[tuple[str, str]] = []
    for line, record in islice(read_records(file), settings.limit):
        try:
            pairs.append((text_in(record, task.document), text_in(record, task.summary)))
        except DataError as error:
            raise DataError(f"{file}:{line}: {error.message}", hint=error.hint) from None
    if not pairs:
        raise DataError(f"{file}: no example")
    made: list[str] = []
    cut = 0
    for document, _ in pairs:
        prompt = task.prompt.format(document=document)
        summary, was_cut = continuation(model, prompt, settings.max_new_tokens, context)
        made.append(summary)
        cut += was_cut
        progress(len(made), len(pairs))
    return {"metrics": mean_f1([right for _, right in pairs], made), "examples": len(made), "cut": cut}
