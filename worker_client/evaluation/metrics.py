"""The tasks' official metrics, from what was chosen and what is right. All are shares between 0 and 1."""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from worker_client.evaluation.cases import Answer

Metrics = Callable[[Sequence[Answer]], dict[str, float]]


def accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    return {"accuracy": _mean([answer.right for answer in answers])}


def accuracy_and_macro_f1(answers: Sequence[Answer]) -> dict[str, float]:
    """CB: accuracy, and F1 of each class, averaged over the classes that were chosen or right, without weights."""
    chosen = [answer.chosen for answer in answers]
    gold = [answer.gold[0] for answer in answers]
    classes = sorted({*chosen, *gold})
    return accuracy(answers) | {"macro_f1": _mean([f1_of(name, chosen, gold) for name in classes])}


def multirc(answers: Sequence[Answer]) -> dict[str, float]:
    """F1a: F1 of "yes" over the answers of all questions together. EM: questions whose answers are all judged rightly
    (Khashabi et al. 2018, "Looking Beyond the Surface", section 5).
    """
    questions: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        questions[answer.group].append(answer.right)
    f1a = f1_of("yes", [answer.chosen for answer in answers], [answer.gold[0] for answer in answers])
    return {"f1a": f1a, "em": _mean([all(right) for right in questions.values()])}


def record(answers: Sequence[Answer]) -> dict[str, float]:
    """F1 over words and EM, against the best of the right answers (arXiv 1810.12885, section 5)."""
    f1 = [max((word_f1(answer.chosen, gold) for gold in answer.gold), default=0.0) for answer in answers]
    em = [any(normalised(answer.chosen) == normalised(gold) for gold in answer.gold) for answer in answers]
    return {"f1": _mean(f1), "em": _mean(em)}


def f1_of(name: str, chosen: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of one class; 0 where it was neither chosen nor right."""
    both = sum(c == g == name for c, g in zip(chosen, gold, strict=True))
    total = chosen.count(name) + gold.count(name)
    return 2 * both / total if total else 0.0


def word_f1(chosen: str, gold: str) -> float:
    """F1 of the words in common, each as often as it occurs in both."""
    words, right = normalised(chosen).split(), normalised(gold).split()
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right)) if common else 0.0


def normalised(text: str) -> str:
    """Small letters, without punctuation and articles, one space between words (SQuAD, arXiv 1606.05250)."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
