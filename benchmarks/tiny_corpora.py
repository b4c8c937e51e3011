"""Made-up corpora and a random model, in the place of real ones: for quick runs, where nothing is at hand."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

from benchmarks.corpora import Corpus, pairs
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from worker_client.evaluation.cases import Example
from worker_client.shapes import Pair

MAX_LENGTH = 16
ROWS = 24
HELD_OUT = 8
FIRST_WORD, WORDS = 10, 80
ANSWERS = {"0": " w2", "1": " w3"}


def save_model(folder: Path) -> Path:
    """A Llama of 4 blocks, and its tokenizer of words w0, w1, ..."""
    save_tiny_model("llama", folder)
    save_word_tokenizer(folder)
    return folder


def _words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{FIRST_WORD + draw.randrange(WORDS)}" for _ in range(count))


def _echo(draw: random.Random) -> Pair:
    """What is asked is answered with the same words."""
    asked = _words(draw, 4)
    return Pair(asked, " " + asked)


def question(draw: random.Random) -> Example:
    """Is the first word of the upper half?"""
    first = draw.randrange(WORDS)
    return Example(f"w{FIRST_WORD + first} {_words(draw, 3)}", ANSWERS, (str(int(first >= WORDS // 2)),))


def questions(name: str, part: str, count: int) -> list[Example]:
    """Of a task's part (train, tune, test), always the same."""
    draw = random.Random(f"{name} {part}")
    return [question(draw) for _ in range(count)]


def _texts() -> Corpus:
    draw = random.Random(0)
    train = {source: [_echo(draw) for _ in range(ROWS)] for source in ("a", "b", "c")}
    tune, test = ([_echo(draw) for _ in range(HELD_OUT)] for _ in range(2))
    return Corpus("medquad", MAX_LENGTH, train, tune, test)


def _tasks() -> Corpus:
    names = ("rte", "cb", "sst2")
    train = {name: pairs(questions(name, "train", ROWS)) for name in names}
    tune = [pair for name in names for pair in pairs(questions(name, "tune", HELD_OUT))]
    test = {name: questions(name, "test", HELD_OUT) for name in names}
    return Corpus("tasks", MAX_LENGTH, train, tune, [pair for asked in test.values() for pair in pairs(asked)], test)


CORPORA: Mapping[str, Corpus] = {"medquad": _texts(), "tasks": _tasks()}


def save_task(folder: Path, name: str) -> None:
    """Made-up records of RTE, `<folder>/<name>/train.jsonl` and `val.jsonl`."""
    (folder / name).mkdir(parents=True)
    for part, count in (("train", ROWS), ("val", HELD_OUT)):
        draw = random.Random(part)
        records = [
            {
                "premise": _words(draw, 4),
                "hypothesis": _words(draw, 2),
                "label": draw.choice(("entailment", "not_entailment")),
            }
            for _ in range(count)
        ]
        (folder / name / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
