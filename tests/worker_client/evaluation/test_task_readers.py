"""Every task's record becomes the prompt and the options that it says, and a record that is not its own is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shared_data import FOLDER
from shared.errors import DataError
from worker_client.evaluation.cases import Example, render
from worker_client.evaluation.tasks import TASKS, ChoiceTask

SUPERGLUE: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it {so}", "passage": "It is.", "label": True, "idx": 0},
    "cb": {"premise": "It may rain.", "hypothesis": "it rains", "label": "neutral", "idx": 0},
    "copa": {
        "premise": "I ran.",
        "choice1": "I'm late.",
        "choice2": "The bus left.",
        "question": "cause",
        "label": 1,
        "idx": 0,
    },
    "multirc": {
        "idx": 7,
        "passage": {
            "text": "A force moves things. ",
            "questions": [
                {"question": "What moves?", "answers": [{"text": "Things", "label": 1}, {"text": "Air", "label": 0}]},
                {"question": "By what?", "answers": [{"text": "Force", "label": 1}]},
            ],
        },
    },
    "record": {
        "passage": {
            "text": "Ann met Bob.\n@highlight\nBob left Ann",
            "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 24, "end": 26}],
        },
        "qas": [{"query": 'Later "@placeholder, who left, sang', "answers": [{"text": "Bob"}, {"text": "Bob"}]}],
    },
    "rte": {"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"},
    "wic": {"word": "feel", "sentence1": "I feel.", "sentence2": "A feel.", "label": False},
    "wsc": {"text": "Ann saw Bob , he ran", "target": {"span1_text": "Bob", "span2_text": "he"}, "label": True},
}


def examples_of(name: str, record: dict[str, Any]) -> Iterator[Example]:
    task = TASKS[name]
    assert isinstance(task, ChoiceTask)
    for case in task.cases(record):
        yield render(task.template, case)


def texts(example: Example) -> set[str]:
    return {example.prompt + option for option in example.options.values()}


def test_what_each_superglue_task_asks() -> None:
    (boolq,) = examples_of("boolq", SUPERGLUE["boolq"])
    assert boolq == Example("It is.\nquestion: is it {so}?\nanswer:", {"yes": " yes", "no": " no"}, ("yes",))
    (cb,) = examples_of("cb", SUPERGLUE["cb"])
    assert cb.prompt == "It may rain.\nquestion: it rains. true, false, or neither?\nanswer:"
    assert cb.options == {"entailment": " true", "contradiction": " false", "neutral": " neither"}
    assert cb.gold == ("neutral",)
    (copa,) = examples_of("copa", SUPERGLUE["copa"])
    assert texts(copa) == {"I ran because I'm late.", "I ran because the bus left."}
    assert copa.options["1"] == " the bus left."
    assert copa.gold == ("1",)
    (effect,) = examples_of("copa", SUPERGLUE["copa"] | {"question": "effect"})
    assert effect.prompt == "I ran so"
    (rte,) = examples_of("rte", SUPERGLUE["rte"])
    assert rte.prompt == "It rains.\nquestion: It is wet. True or False?\nanswer:"
    assert (rte.options["not_entailment"], rte.gold) == (" False", ("not_entailment",))
    (wic,) = examples_of("wic", SUPERGLUE["wic"])
    assert wic.prompt.startswith("I feel.\nA feel.\nquestion: Is the word 'feel' used in the same way")
    assert wic.gold == ("no",)
    (wsc,) = examples_of("wsc", SUPERGLUE["wsc"])
    assert "does the pronoun 'he' refer to 'Bob'?" in wsc.prompt
    assert (wsc.gold, wsc.chance) == (("yes",), 0.5)


def test_multirc_is_a_decision_an_answer_grouped_by_question() -> None:
    cases = list(examples_of("multirc", SUPERGLUE["multirc"]))
    assert [case.gold for case in cases] == [("yes",), ("no",), ("yes",)]
    assert [case.group for case in cases] == ["7/0", "7/0", "7/1"]
    assert cases[1].prompt == (
        "A force moves things. \nquestion: What moves?\nanswer: Air\nIs this answer correct, yes or no?\nanswer:"
    )


def test_record_fills_the_placeholder_with_each_entity_once() -> None:
    (example,) = examples_of("record", SUPERGLUE["record"])
    assert example.prompt == 'Ann met Bob.\n- Bob left Ann\nLater "'
    assert example.options == {"Ann": "Ann, who left, sang", "Bob": "Bob, who left, sang"}
    assert (example.gold, example.chance) == (("Bob", "Bob"), 0.5)
    query = {"query": "It was @placeholder.", "answers": [{"text": "Ann"}]}
    (spaced,) = examples_of("record", SUPERGLUE["record"] | {"qas": [query]})
    assert spaced.prompt.endswith("\nIt was")
    assert spaced.options["Ann"] == " Ann."


def test_classification_from_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "sst2").write_text("1 a fine film .\n\n0 dull\n")
    task = TASKS["sst2"]
    assert isinstance(task, ChoiceTask)
    found = [(line, next(task.cases(record))) for line, record in task.records(tmp_path / "sst2")]
    assert [(line, case.fields["sentence"], case.gold) for line, case in found] == [
        (1, "a fine film .", ("1",)),
        (3, "dull", ("0",)),
    ]
    (news,) = examples_of("agnews", {"Class Index": "3", "Title": "Oil", "Description": "It rose."})
    assert (news.prompt, news.gold) == ("Oil\nIt rose.\nThis news is about", ("3",))
    assert news.options["3"] == " business"


@pytest.mark.parametrize("name", SUPERGLUE)
def test_a_record_without_what_is_right_or_of_another_task_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r'no "'):
        list(examples_of(name, {"idx": 0}))
    with pytest.raises(DataError):
        list(examples_of(name, dict.fromkeys(SUPERGLUE[name])))
    if "label" in SUPERGLUE[name]:
        with pytest.raises(DataError, match='no "label"'):
            list(examples_of(name, {key: value for key, value in SUPERGLUE[name].items() if key != "label"}))
        with pytest.raises(DataError, match="\"label\" is 'perhaps'"):
            list(examples_of(name, SUPERGLUE[name] | {"label": "perhaps"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qas": [{"query": "no place", "answers": [{"text": "Ann"}]}]}, "has no @placeholder"),
        ({"qas": [{"query": "@placeholder", "answers": []}]}, '"answers" is empty'),
        ({"passage": {"text": "a", "entities": []}}, '"entities" is empty'),
        ({"passage": {"text": "a", "entities": [1]}}, '"entities" must be a list of objects'),
    ],
)
def test_what_record_cannot_ask_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(examples_of("record", SUPERGLUE["record"] | changes))


FILES = {
    "boolq": ("superglue_fewglue32dev/BoolQ/val.jsonl", 3270, 2),
    "cb": ("superglue_fewglue32dev/CB/val.jsonl", 56, 3),
    "copa": ("superglue_fewglue32dev/COPA/val.jsonl", 100, 2),
    "multirc": ("superglue_fewglue32dev/MultiRC/val.jsonl", 4848, 2),
    "record": ("superglue_fewglue32dev/ReCoRD/dev32.jsonl", 32, None),
    "rte": ("superglue_fewglue32dev/RTE/val.jsonl", 277, 2),
    "wic": ("superglue_fewglue32dev/WiC/val.jsonl", 638, 2),
    "wsc": ("superglue_fewglue32dev/WSC/val.jsonl", 104, 2),
    "sst2": ("rte_cb_sst2_trec_agnews/sst2/stsa.binary.test", 1821, 2),
    "agnews": ("rte_cb_sst2_trec_agnews/agnews/test.csv", 7600, 4),
}


@pytest.mark.parametrize("name", FILES)
def test_the_whole_public_file_is_read(name: str) -> None:
    file, count, options = FILES[name]
    path = FOLDER / "tasks" / file
    if not path.exists():
        pytest.skip(f"there is no {path}")
    task = TASKS[name]
    assert isinstance(task, ChoiceTask)
    examples = [render(task.template, case) for _, record in task.records(path) for case in task.cases(record)]
    assert len(examples) == count
    for example in examples:
        assert set(example.gold) & set(example.options)
        assert len(example.options) == options or options is None
