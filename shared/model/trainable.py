"""What is trained in a part: by name, by shape, and how it is made so by the job's method (shared/model/methods)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.job import Job
from shared.model.carve import Part, empty_part, tie
from shared.model.methods import METHODS
from shared.model.plan import SplitPlan


def make_trainable(part: Part, job: Job) -> None:
    """Freeze the part, then add or free what the job's method trains there. Raises JobError."""
    part.module.requires_grad_(False)
    part.first_position = job.prefix_tokens
    if part.name in job.training.parts:
        METHODS[job.method.type](part, job)


def trained(parts: Iterable[Part]) -> dict[str, nn.Parameter]:
    """The trained parameters of the parts by global name, in a fixed order; a tied one appears once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for part in parts:
        for name, parameter in part.named_parameters().items():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = parameter
    return found


def update_shapes(config: Any, plan: SplitPlan, job: Job) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a client trains in its parts, from the configuration alone: no weights are made."""
    parts = {name: empty_part(config, plan, name) for name in job.client_parts}
    if config.tie_word_embeddings:
        tie(parts["head"], parts["tail"])
    for part in parts.values():
        with torch.device("meta"):
            make_trainable(part, job)
    return {name: tuple(parameter.shape) for name, parameter in trained(parts.values()).items()}


def load_trained(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the parameters of the same names; names and shapes must agree exactly (KeyError)."""
    if parameters.keys() != values.keys():
        raise KeyError(f"{len(parameters.keys() ^ values.keys())} names differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
