"""Summaries: greedy continuations of a prompt, compared with people's by ROUGE (Lin 2004, library rouge-score)."""

from collections.abc import Callable, Sequence
from typing import Any

from shared.errors import UsageError
from worker_client.evaluation.model import Model

MEASURES = ("rouge1", "rouge2", "rougeL")


def rouge() -> Callable[[Sequence[str], Sequence[str]], dict[str, float]]:
    """Mean F1 of ROUGE-1, -2 and -L over pairs of (reference, summary), words stemmed. Raises UsageError without the
    library."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError("ROUGE needs the library 'rouge-score'", hint="pip install 'flglm[eval]'") from None
    scorer = RougeScorer(list(MEASURES), use_stemmer=True)

    def mean_f1(references: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
        scores = [scorer.score(reference, made) for reference, made in zip(references, summaries, strict=True)]
        return {name: sum(score[name].fmeasure for score in scores) / max(1, len(scores)) for name in MEASURES}

    return mean_f1


def continuation(model: Model, prompt: str, max_new_tokens: int, context: int) -> tuple[str, bool]:
    """The most probable next token again and again, until the end token or `max_new_tokens` of them.

    The prompt is cut at its beginning where it leaves no room in `context` tokens; and whether it was.
    """
    ids: list[int] = model.tokenizer(prompt).input_ids
    cut = max(0, len(ids) + max_new_tokens - context)
    made: Any = model.tokenizer.decode(model.continued(ids[cut:], max_new_tokens), skip_special_tokens=True)
    return str(made).strip(), cut > 0
