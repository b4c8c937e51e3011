"""Is one way of training as good as another? By a rule that is stated, from scores over seeds. No I/O."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from worker_client.evaluation.cases import Answer, Example
from worker_client.evaluation.metrics import Metrics

Says = Literal["confirmed", "refuted", "says nothing"]

RULE = (
    "Equal within the spread: the means over the seeds differ by at most the pooled standard deviation. Where neither "
    "is above blind answering by more than its own standard deviation, nothing was learnt, and the comparison says "
    "nothing; nor does one seed."
)


@dataclass(frozen=True)
class Verdict:
    """`difference` of the means, split less centralised; `spread` the pooled standard deviation."""

    difference: float
    spread: float
    says: Says


def pooled_spread(a: Sequence[float], b: Sequence[float]) -> float:
    """The square root of the two samples' variances, weighted by their degrees of freedom. Two values each at least."""
    freedom = len(a) + len(b) - 2
    squares = (len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)
    return float((squares / freedom) ** 0.5)


def verdict(split: Sequence[float], centralised: Sequence[float], blind: float) -> Verdict:
    """By RULE, from scores over seeds; `blind`: what the best constant answer scores."""
    difference = statistics.mean(split) - statistics.mean(centralised)
    if min(len(split), len(centralised)) < 2:
        return Verdict(difference, 0.0, "says nothing")
    spread = pooled_spread(split, centralised)
    if not any(statistics.mean(scores) - blind > statistics.stdev(scores) for scores in (split, centralised)):
        return Verdict(difference, spread, "says nothing")
    return Verdict(difference, spread, "confirmed" if abs(difference) <= spread else "refuted")


def overall(verdicts: Iterable[Verdict]) -> Says:
    """Refuted if it is anywhere, confirmed if it is somewhere."""
    said = {each.says for each in verdicts}
    return "refuted" if "refuted" in said else "confirmed" if "confirmed" in said else "says nothing"


def score_of(metrics: dict[str, float]) -> float:
    """One number of a task: the mean of its metrics, as SuperGLUE does it (arXiv 1905.00537, section 3)."""
    return statistics.mean(metrics.values())


def blind_score(questions: Sequence[Example], metrics: Metrics) -> float:
    """The best score of one answer to all questions; where no option is everyone's, how often chance is right."""
    everywhere = set.intersection(*(set(question.options) for question in questions))
    if not everywhere:
        return statistics.mean(question.chance for question in questions)
    return max(
        score_of(metrics([Answer(name, question.gold, question.group) for question in questions]))
        for name in everywhere
    )
