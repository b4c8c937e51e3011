"""What is trained in a part: by name, by shape, and how it is made so by the job's method (shared/model/methods)."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import JobError
from shared.job import Job, Lora
from shared.model.carve import Part, empty_part, load_head_and_tail, load_part, tie
from shared.model.checkpoint import Checkpoint
from shared.model.methods import METHODS
from shared.model.methods.lora import drawn_a
from shared.model.plan import PartName, SplitPlan


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


def handed_in(parts: Collection[Part], job: Job) -> dict[str, nn.Parameter]:
    """Of the trained parameters of a client's parts, those that it hands in and takes back averaged; in the order of
    `trained`. Raises JobError if a tied one is personal in one part only.
    """
    stay, leave = (
        {id(p) for part in parts if part.name in names for p in part.module.parameters() if p.requires_grad}
        for names in (job.aggregation.personal, job.handed_in)
    )
    if stay & leave:
        raise JobError(
            f"aggregation.personal={list(job.aggregation.personal)}: this model's output layer is its embedding "
            "(tie_word_embeddings), which method.type=full trains in head and tail at once: name both or neither"
        )
    return {name: parameter for name, parameter in trained(parts).items() if id(parameter) not in stay}


def update_shapes(config: Any, plan: SplitPlan, job: Job) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a client hands in, from the configuration alone: no weights are made.

    Raises JobError.
    """
    parts = weightless_parts(config, plan, job, job.client_parts)
    return {name: tuple(parameter.shape) for name, parameter in handed_in(parts, job).items()}


def weightless_parts(config: Any, plan: SplitPlan, job: Job, names: Sequence[PartName]) -> list[Part]:
    """These parts with what the job trains in them, on the meta device: for names and shapes.

    Raises ModelError, JobError.
    """
    parts = {name: empty_part(config, plan, name) for name in names}
    if config.tie_word_embeddings and "head" in parts and "tail" in parts:
        tie(parts["head"], parts["tail"])
    for part in parts.values():
        with torch.device("meta"):
            make_trainable(part, job)
    return list(parts.values())


def initial_values(checkpoint: Checkpoint, plan: SplitPlan, job: Job) -> dict[str, Tensor]:
    """What every client's parts begin with, of what is handed in of them, by global name: float32.

    LoRA's follow from seed and names, and no weights are read; what else is trained needs the checkpoint. Raises
    ModelError.
    """
    if not job.handed_in:
        return {}
    if isinstance(job.method, Lora) and not job.method.use_dora:
        return {
            name: drawn_a(name, shape, job.training.seed) if ".lora_A." in name else torch.zeros(shape)
            for name, shape in update_shapes(checkpoint.config, plan, job).items()
        }
    head, tail = load_head_and_tail(checkpoint, plan)
    parts = [head, *([load_part(checkpoint, plan, "trunk")] if "trunk" in job.client_parts else []), tail]
    for part in parts:
        make_trainable(part, job)
    return {name: parameter.detach() for name, parameter in handed_in(parts, job).items()}


def load_trained(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the parameters of the same names; names and shapes must agree exactly (KeyError)."""
    if parameters.keys() != values.keys():
        raise KeyError(f"{len(parameters.keys() ^ values.keys())} names differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
