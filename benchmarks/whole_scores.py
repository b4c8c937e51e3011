"""A whole model, of plain transformers and peft, with what a joint run trained; and what it scores.

The same measure for joint, centralised and lone training: none of the splitting or packing code is used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.corpora import choice_task
from launcher.baselines import padded_logits, score_whole
from launcher.whole_models import with_method
from shared.errors import ModelError
from shared.job import Job
from shared.model.families import family_of
from worker_client.batches import Batch
from worker_client.data import Row
from worker_client.evaluation.cases import Answer, Example
from worker_client.evaluation.scoring import choose

ROWS_AT_ONCE = 32


def whole_with(job: Job, trained: Mapping[str, Tensor], device: str = "cpu") -> nn.Module:
    """The job's model with these values, in evaluation mode. Raises ModelError if they are not what the job trains."""
    model = AutoModelForCausalLM.from_pretrained(job.model_name_or_path, dtype=torch.float32)
    wrapped, parameters = with_method(model, job, family_of(model.config))
    strange = sorted(trained.keys() - parameters.keys())
    if strange or not trained:
        raise ModelError(f"the whole model trains no {strange[0] if strange else 'tensor'}")
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
    whole: nn.Module = wrapped.to(device).eval()
    return whole


def held_out_loss(model: nn.Module, rows: Sequence[Row]) -> float:
    """Mean loss of the tokens that count, in nats."""
    return score_whole(model, rows, ROWS_AT_ONCE).loss


@torch.no_grad()
def metrics(
    model: nn.Module, tokenizer: Any, task: str, questions: Sequence[Example], context: int
) -> dict[str, float]:
    """The task's own, the option of largest log-likelihood being the answer; prompts are cut to `context` tokens."""
    kind = choice_task(task)

    def logits(batch: Batch) -> Tensor:
        return padded_logits(model, batch).float().cpu()

    answers: list[Answer] = []
    for start in range(0, len(questions), ROWS_AT_ONCE):
        asked = questions[start : start + ROWS_AT_ONCE]
        choices = choose(logits, tokenizer, asked, context=context, per_token=kind.per_token)
        answers += [Answer(c.name, q.gold, q.group) for c, q in zip(choices, asked, strict=True)]
    return kind.metrics(answers)
