"""What is trained in a part, by method: the place where a method turns modules into trainable parameters.

LoRA comes from peft. Its A matrices are drawn per tensor from the job's seed and the tensor's name in the whole model,
so that every client starts from the same adapters, and a split model from the same as the whole one.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.errors import JobError
from shared.job import Job, Lora
from shared.model.carve import Part, empty_part, load_head_and_tail, tie
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan

ADAPTER = "default"


def make_trainable(part: Part, job: Job) -> None:
    """Freeze the part, then add or free what the job's method trains there. Raises JobError."""
    part.module.requires_grad_(False)
    if part.name not in job.training.parts:
        return
    if isinstance(job.method, Lora):
        add_lora(part.module, job.method, part.family.lora_targets)
        reseed_lora(part.named_parameters().items(), job.training.seed)
        if job.aggregation.lora == "freeze_a":
            for name, parameter in part.named_parameters().items():
                parameter.requires_grad_(".lora_B." in name)
    else:
        part.module.requires_grad_(True)


def add_lora(module: nn.Module, lora: Lora, default_targets: tuple[str, ...]) -> None:
    """Inject LoRA layers, in place. Raises JobError if no module has one of the target names."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules or default_targets),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in module.modules()),  # GPT-2 keeps weights transposed
    )
    try:
        inject_adapter_in_model(config, module, ADAPTER)
    except ValueError as error:
        raise JobError(f"method.target_modules: {str(error).splitlines()[0][:200]}") from None
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # peft gives adapters the type of frozen weights


def reseed_lora(parameters: Iterable[tuple[str, nn.Parameter]], seed: int) -> None:
    """Draw each LoRA A anew, uniform in +-1/sqrt(in_features) as peft does, from `seed` and its global name."""
    for name, parameter in parameters:
        if ".lora_A." in name:
            with torch.no_grad():
                parameter.copy_(_drawn(name, parameter.shape, seed))


def _drawn(name: str, shape: Sequence[int], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


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
    """Names and shapes of what a client trains in head and tail, from the configuration alone: no weights are made."""
    head, tail = empty_part(config, plan, "head"), empty_part(config, plan, "tail")
    if config.tie_word_embeddings:
        tie(head, tail)
    for part in (head, tail):
        with torch.device("meta"):
            make_trainable(part, job)
    return {name: tuple(parameter.shape) for name, parameter in trained([head, tail]).items()}


def initial_values(checkpoint: Checkpoint, plan: SplitPlan, job: Job) -> dict[str, Tensor]:
    """What every client's head and tail begin with, of what is trained in them, by global name: float32.

    LoRA's follow from seed and names, and no weights are read; what else is trained is in the checkpoint. Raises
    ModelError.
    """
    if not {"head", "tail"} & set(job.training.parts):
        return {}
    if isinstance(job.method, Lora):
        return {
            name: _drawn(name, shape, job.training.seed) if ".lora_A." in name else torch.zeros(shape)
            for name, shape in update_shapes(checkpoint.config, plan, job).items()
        }
    parts = load_head_and_tail(checkpoint, plan)
    for part in parts:
        make_trainable(part, job)
    return {name: parameter.detach() for name, parameter in trained(parts).items()}


def load_trained(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the parameters of the same names; names and shapes must agree exactly (KeyError)."""
    if parameters.keys() != values.keys():
        raise KeyError(f"{len(parameters.keys() ^ values.keys())} names differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
