"""Prompt tuning: trained embeddings of virtual tokens before each row (arXiv 2104.08691, section 2).

They belong to the head, which is all that is trained; everybody else's weights are frozen. Virtual token i has the id
-1 - i, so that rows grow by these tokens wherever they are packed and nothing else knows of them. They begin as the
embeddings of tokens drawn from the vocabulary (section 3.2; `prompt_tuning_init: SAMPLE_VOCAB` in peft).
"""

from typing import Any

import torch
from torch import Tensor, nn

from shared.job import Job, Prompt
from shared.model.carve import Part
from shared.model.draws import generator_of
from shared.model.families import Family


class PromptedEmbedding(nn.Module):
    """A model's embedding, and beside it that of the virtual tokens, `prompt` (n, d) float32."""

    def __init__(self, embedding: Any, prompt: Tensor) -> None:
        super().__init__()
        self.embedding = embedding
        self.prompt = nn.Parameter(prompt)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (..., T) int64, virtual ones negative, to (..., T, d)."""
        tokens: Tensor = self.embedding(input_ids.clamp_min(0))
        virtual = self.prompt[(-1 - input_ids).clamp_min(0)].to(tokens.dtype)
        return torch.where((input_ids < 0).unsqueeze(-1), virtual, tokens)


def virtual_ids(count: int) -> list[int]:
    """The ids of `count` virtual tokens, in their order."""
    return [-1 - index for index in range(count)]


def add(part: Part, job: Job) -> None:
    """The job sees to it that `part` is the head."""
    assert isinstance(job.method, Prompt)
    embedding = getattr(part.base, part.family.embedding)
    name = name_in(part.module.base_model_prefix, part.family)
    first = first_values(embedding, job.method.num_virtual_tokens, job.training.seed, name)
    setattr(part.base, part.family.embedding, PromptedEmbedding(embedding, first))


def name_in(base_model_prefix: str, family: Family) -> str:
    """The parameter's name in the whole model."""
    return f"{base_model_prefix}.{family.embedding}.prompt"


@torch.no_grad()
def first_values(embedding: Any, count: int, seed: int, name: str) -> Tensor:
    """(count, d) float32: the embeddings of so many tokens, drawn for the parameter of that name."""
    ids = torch.randint(0, embedding.weight.shape[0], (count,), generator=generator_of(seed, name), device="cpu")
    values: Tensor = embedding(ids.to(embedding.weight.device)).float()
    return values
