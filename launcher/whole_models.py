"""The whole model in one process, trained by a job's method as plain transformers and peft do it.

For what a joint run is compared with: it starts from the values that the parts of the split model start from.
"""

import warnings
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import nn

from shared.job import Full, Job, Lora, Prompt
from shared.model.families import Family
from shared.model.methods import prompt
from shared.model.methods.lora import add_lora, reseed_lora


def with_method(model: Any, job: Job, family: Family) -> tuple[Any, dict[str, nn.Parameter]]:
    """The model, or peft's around it, and what all parts of it train, by their names in split training."""
    model.requires_grad_(isinstance(job.method, Full))
    match job.method:
        case Lora():
            add_lora(model, job.method, family.lora_targets)
            reseed_lora(model.named_parameters(), job.training.seed)
        case Prompt():
            return _with_prompt(model, job.method, job.training.seed, family)
        case Full():
            pass
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def _with_prompt(model: Any, method: Prompt, seed: int, family: Family) -> tuple[Any, dict[str, nn.Parameter]]:
    embedding, name = model.get_input_embeddings(), prompt.name_in(model.base_model_prefix, family)
    first = prompt.first_values(embedding, method.num_virtual_tokens, seed, name)
    wrapped = _wrapped(model, PromptTuningConfig(TaskType.CAUSAL_LM, num_virtual_tokens=method.num_virtual_tokens))
    weight = wrapped.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(first)
    return wrapped, {name: weight}


def _wrapped(model: Any, config: Any) -> Any:
    with warnings.catch_warnings():  # of what peft asks transformers
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        return get_peft_model(model, config)
