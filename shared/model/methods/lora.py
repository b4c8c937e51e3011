"""LoRA: low-rank updates beside frozen weights (arXiv 2106.09685, section 4.1), from peft.

So are its variants: rsLoRA (arXiv 2312.03732, section 3: another factor) and DoRA (arXiv 2402.09353, section 4: the
weights' magnitudes are trained too, and begin as they are).

Its A matrices are drawn per tensor from the job's seed and the tensor's name in the whole model, so that every client
starts from the same adapters, and a split model from the same as the whole one.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.errors import JobError
from shared.job import Job, Lora
from shared.model.carve import Part
from shared.model.draws import generator_of

ADAPTER = "default"


def add(part: Part, job: Job) -> None:
    """Raises JobError if no module has one of the target names."""
    assert isinstance(job.method, Lora)
    add_lora(part.module, job.method, part.family.lora_targets)
    reseed_lora(part.named_parameters().items(), job.training.seed)
    if job.aggregation.lora == "freeze_a":
        for name, parameter in part.named_parameters().items():
            parameter.requires_grad_(".lora_B." in name)


def add_lora(module: nn.Module, lora: Lora, default_targets: tuple[str, ...]) -> None:
    """Inject LoRA layers, in place. Raises JobError if no module has one of the target names."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
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
                parameter.copy_(drawn_a(name, parameter.shape, seed))


def drawn_a(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """What a LoRA A of this name and shape (r, in_features) begins with, float32."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape, device="cpu").uniform_(-bound, bound, generator=generator_of(seed, name))
