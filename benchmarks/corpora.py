"""Text for clients to train on: pairs of prompt and completion by source, held-out pairs, and questions to answer.

MedQuAD's sources are the institutes whose pages it was made of. Of tasks that are answered by choosing, each is a
source: the prompt of its template, the right option as completion.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import DataError
from worker_client.data import Row, fit, tokenize_content
from worker_client.evaluation.cases import Example, render
from worker_client.evaluation.tasks import TASKS, ChoiceTask
from worker_client.record_files import read_records
from worker_client.shapes import Pair


@dataclass(frozen=True)
class Sizes:
    """Pairs of each source: to train on, to choose learning rates by, to measure on (at most)."""

    train: int
    tune: int
    test: int


@dataclass(frozen=True)
class Corpus:
    """`train` by source. Rows are at most `max_length` tokens. `questions`: of `test`, by task, if it is one."""

    name: str
    max_length: int
    train: Mapping[str, Sequence[Pair]]
    tune: Sequence[Pair]
    test: Sequence[Pair]
    questions: Mapping[str, Sequence[Example]] = field(default_factory=dict)


def choice_task(name: str) -> ChoiceTask:
    """Raises DataError for a task that is not answered by choosing."""
    task = TASKS.get(name)
    if not isinstance(task, ChoiceTask):
        known = ", ".join(name for name, task in TASKS.items() if isinstance(task, ChoiceTask))
        raise DataError(f"'{name}' is no task with options to choose from", hint=f"tasks: {known}")
    return task


def examples(name: str, path: Path) -> list[Example]:
    """All questions of a task's file. Raises DataError naming file, line and reason."""
    task = choice_task(name)
    found: list[Example] = []
    for line, record in task.records(path):
        try:
            found += [render(task.template, case) for case in task.cases(record)]
        except DataError as error:
            raise DataError(f"{path}:{line}: {error.message}", hint=error.hint) from None
    return found


def pairs(questions: Iterable[Example]) -> list[Pair]:
    """The prompts with their right options."""
    return [
        Pair(question.prompt, question.options[right])
        for question in questions
        if (right := next((name for name in question.gold if name in question.options), None)) is not None
    ]


def shuffled(values: Sequence[Any], seed: int) -> list[Any]:
    drawn = list(values)
    random.Random(seed).shuffle(drawn)
    return drawn


def medquad(path: Path, sources: Sequence[str], sizes: Sizes, *, max_length: int) -> Corpus:
    """The question as prompt, the answer as completion, cut at the end. Raises DataError."""
    found: dict[str, list[Pair]] = {source: [] for source in sources}
    for _, record in read_records(path):
        if record["source"] in found:
            # Five characters a token and more: what is cut here would be cut below.
            found[record["source"]].append(Pair(record["question"], record["answer"][: 20 * max_length]))
    train: dict[str, list[Pair]] = {}
    tune: list[Pair] = []
    test: list[Pair] = []
    for source, all_of_it in found.items():
        mine = shuffled(all_of_it, 0)
        test += mine[: sizes.test]
        tune += mine[sizes.test : sizes.test + sizes.tune]
        train[source] = mine[sizes.test + sizes.tune :][: sizes.train]
    return Corpus("medquad", max_length, train, tune, test)


def tasks(files: Mapping[str, tuple[Path, Path]], sizes: Sizes, tokenizer: Any, *, max_length: int) -> Corpus:
    """`files`: of each task, what to train on and what to measure on. Prompts are cut to fit. Raises DataError."""
    train: dict[str, list[Pair]] = {}
    tune: list[Pair] = []
    questions: dict[str, list[Example]] = {}
    for name, (for_training, for_test) in files.items():
        mine = [shortened(pair, tokenizer, max_length) for pair in pairs(shuffled(examples(name, for_training), 0))]
        tune += mine[: sizes.tune]
        train[name] = mine[sizes.tune :][: sizes.train]
        questions[name] = shuffled(examples(name, for_test), 0)[: sizes.test]
    test = [shortened(pair, tokenizer, max_length) for asked in questions.values() for pair in pairs(asked)]
    return Corpus("tasks", max_length, train, tune, test, questions)


def shortened(pair: Pair, tokenizer: Any, max_length: int) -> Pair:
    """A pair whose row has at most `max_length` tokens: the prompt loses its beginning."""
    while (over := len(tokenize_content(pair, tokenizer).input_ids) - max_length) > 0:
        starts = [start for start, _ in tokenizer(pair.prompt, return_offsets_mapping=True).offset_mapping]
        if over >= len(starts) or starts[over] == 0:
            raise DataError(f"a completion leaves no room for its prompt in {max_length} tokens")
        pair = Pair(pair.prompt[starts[over] :], pair.completion)
    return pair


def rows_of(found: Iterable[Pair], tokenizer: Any, max_length: int) -> list[Row]:
    """As a client reads them; a row in which, where so cut, no token counts is left out."""
    rows = (fit(tokenize_content(pair, tokenizer), max_length, "truncate") for pair in found)
    return [row for row in rows if row is not None and row.target_tokens]
