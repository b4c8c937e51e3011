"""The official metrics, on answers small enough to work out by hand."""

import pytest

from worker_client.evaluation.cases import Answer
from worker_client.evaluation.metrics import accuracy, accuracy_and_macro_f1, multirc, normalised, record, word_f1


def test_accuracy_counts_any_of_the_right_names() -> None:
    answers = [Answer("a", ("a",)), Answer("a", ("b",)), Answer("b", ("a", "b")), Answer("c", ())]
    assert accuracy(answers) == {"accuracy": 0.5}


def test_cb_macro_f1_by_hand() -> None:
    """entailment 2 * 1 / (2 + 2), contradiction 2 * 1 / (2 + 1), neutral 0: (1/2 + 2/3 + 0) / 3."""
    gold = ["entailment", "entailment", "contradiction", "neutral"]
    chosen = ["entailment", "contradiction", "contradiction", "entailment"]
    answers = [Answer(c, (g,)) for c, g in zip(chosen, gold, strict=True)]
    assert accuracy_and_macro_f1(answers) == pytest.approx({"accuracy": 0.5, "macro_f1": (1 / 2 + 2 / 3) / 3})


def test_always_the_same_class_has_the_macro_f1_of_that_class_alone() -> None:
    """3 of 4 are right: F1 of that class is 2 * 3 / (4 + 3), of the other 0."""
    answers = [Answer("x", (gold,)) for gold in "xxxy"]
    assert accuracy_and_macro_f1(answers) == pytest.approx({"accuracy": 0.75, "macro_f1": 6 / 7 / 2})


def test_multirc_by_hand() -> None:
    """Question 1 is judged rightly throughout, question 2 not. Of 3 right answers 2 were called right, and 1 wrong one:
    F1a is 2 * 2 / (3 + 3)."""
    answers = [
        Answer("yes", ("yes",), "1"),
        Answer("no", ("no",), "1"),
        Answer("yes", ("yes",), "2"),
        Answer("yes", ("no",), "2"),
        Answer("no", ("yes",), "2"),
    ]
    assert multirc(answers) == pytest.approx({"f1a": 2 / 3, "em": 1 / 2})


def test_multirc_without_any_yes_is_nothing() -> None:
    assert multirc([Answer("no", ("yes",), "1"), Answer("no", ("no",), "1")]) == {"f1a": 0.0, "em": 0.0}
    assert multirc([Answer("no", ("no",), "1")]) == {"f1a": 0.0, "em": 1.0}


def test_record_takes_the_best_of_the_right_answers() -> None:
    """First: exact after normalising. Second: one of its two words is all of the right one's: 2 * 1 / (2 + 1)."""
    answers = [Answer("the U.S.", ("America", "US")), Answer("Barack Obama", ("Obama", "the president"))]
    assert record(answers) == pytest.approx({"f1": (1 + 2 / 3) / 2, "em": 0.5})


def test_words_are_counted_as_often_as_they_occur_in_both() -> None:
    assert word_f1("New York New York", "York") == pytest.approx(2 / 5)
    assert word_f1("Paris", "London") == 0.0
    assert word_f1("the", "a") == 0.0
    assert normalised(" The  theatre, an owl's\ta.") == "theatre owls"
