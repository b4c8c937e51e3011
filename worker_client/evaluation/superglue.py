"""The eight SuperGLUE tasks (arXiv 1905.00537) from their own JSON lines: a reader a task, from a record to its cases.

Readers raise DataError for a record that is not the task's.
"""

from collections.abc import Iterator
from typing import Any

from shared.errors import DataError
from worker_client.evaluation.cases import Case
from worker_client.evaluation.records import label_in, list_in, number_in, object_in, text_in

# JSON's true and 1 are the same key in Python, and both occur.
YES_NO = {True: "yes", False: "no"}
PLACEHOLDER = "@placeholder"


def boolq(record: dict[str, Any]) -> Iterator[Case]:
    yield Case(_texts(record, "passage", "question"), (label_in(record, YES_NO),))


def cb(record: dict[str, Any]) -> Iterator[Case]:
    names = {name: name for name in ("entailment", "contradiction", "neutral")}
    yield Case(_texts(record, "premise", "hypothesis"), (label_in(record, names),))


def copa(record: dict[str, Any]) -> Iterator[Case]:
    """ "The man turned on the faucet, so" ... or "because" ..."""
    connectives = {"cause": "because", "effect": "so"}
    asked = text_in(record, "question")
    if asked not in connectives:
        raise DataError(f'"question" is {asked!r}; expected cause or effect')
    fields = {
        "premise": text_in(record, "premise").rstrip(" ."),
        "connective": connectives[asked],
        "choice1": _begun_small(text_in(record, "choice1")),
        "choice2": _begun_small(text_in(record, "choice2")),
    }
    yield Case(fields, (label_in(record, {0: "0", 1: "1"}),))


def multirc(record: dict[str, Any]) -> Iterator[Case]:
    """A case an answer; the answers to one question are a group."""
    passage = object_in(record, "passage")
    text = text_in(passage, "text")
    for number, question in enumerate(list_in(passage, "questions")):
        for answer in list_in(question, "answers"):
            fields = {"passage": text, "question": text_in(question, "question"), "answer": text_in(answer, "text")}
            yield Case(fields, (label_in(answer, YES_NO),), group=f"{number_in(record, 'idx')}/{number}")


def record(record: dict[str, Any]) -> Iterator[Case]:
    """A case a query; candidates are the passage's entities, each once."""
    passage = object_in(record, "passage")
    text = text_in(passage, "text")
    places = [(number_in(entity, "start"), number_in(entity, "end")) for entity in list_in(passage, "entities")]
    entities = tuple(dict.fromkeys(text[start : end + 1] for start, end in places))
    if not entities:
        raise DataError('"entities" is empty: there is nothing to choose from')
    for query in list_in(record, "qas"):
        before, found, after = text_in(query, "query").partition(PLACEHOLDER)
        if not found:
            raise DataError(f'"query" has no {PLACEHOLDER}')
        fields = {
            "passage": text.replace("\n@highlight\n", "\n- "),
            "before": before.rstrip(" "),
            "space": " " if before.endswith(" ") else "",
            "after": after,
        }
        gold = tuple(text_in(answer, "text") for answer in list_in(query, "answers"))
        if not gold:
            raise DataError('"answers" is empty: what is right must be known')
        yield Case(fields, gold, entities)


def rte(record: dict[str, Any]) -> Iterator[Case]:
    names = {name: name for name in ("entailment", "not_entailment")}
    yield Case(_texts(record, "premise", "hypothesis"), (label_in(record, names),))


def wic(record: dict[str, Any]) -> Iterator[Case]:
    yield Case(_texts(record, "sentence1", "sentence2", "word"), (label_in(record, YES_NO),))


def wsc(record: dict[str, Any]) -> Iterator[Case]:
    target = object_in(record, "target")
    fields = {
        "text": text_in(record, "text"),
        "noun": text_in(target, "span1_text"),
        "pronoun": text_in(target, "span2_text"),
    }
    yield Case(fields, (label_in(record, YES_NO),))


def _texts(record: dict[str, Any], *keys: str) -> dict[str, str]:
    return {key: text_in(record, key) for key in keys}


def _begun_small(sentence: str) -> str:
    """In the middle of a sentence. "I" stays."""
    first, _, _ = sentence.partition(" ")
    return sentence if first == "I" or first.startswith("I'") else sentence[:1].lower() + sentence[1:]
