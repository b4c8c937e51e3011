"""The whole model in one process, trained by a job's method as plain transformers and peft do it.

For what a joint run is compared with: it starts from the values that the parts of the split model start from.
"""

import warnings
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shared.errors import JobError
from shared.job import Full, Job, Lora, Prefix, Prompt
from shared.model.checkpoint import checkpoint_of
from shared.model.draws import draw_weights
from shared.model.families import Family
from shared.model.methods import prefix, prompt
from shared.model.methods.lora import add_lora, reseed_lora
from shared.model.plan import SplitPlan
from shared.model.trainable import trained, weightless_parts


def drawn_whole(job: Job) -> Any:
    """A model of transformers, with the weights that the parts of a job from scratch draw."""
    config = checkpoint_of(job).config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    draw_weights(model, model, {name: name for name in names}, job.training.seed)
    model.tie_weights()
    return model


def check_whole(job: Job) -> None:
    """Raises JobError for what plain peft cannot train in a whole model."""
    if isinstance(job.method, Prefix) and set(job.training.parts) != {"head", "trunk", "tail"}:
        raise JobError("peft has no prefixes in some layers alone to compare with: name all of training.parts")


def with_method(model: Any, job: Job, family: Family) -> tuple[Any, dict[str, nn.Parameter]]:
    """The model, or peft's around it, and what of it the job trains, by the names and in the parts of split training.

    Raises JobError for what plain peft cannot do, or a split that does not fit the model.
    """
    plan = SplitPlan(job.split.head_blocks, job.split.tail_blocks, model.config.num_hidden_layers)
    names = trained(weightless_parts(model.config, plan, job, ("head", "trunk", "tail")))
    whole, parameters = _with_method(model, job, family)
    whole.requires_grad_(False)
    for name in names:
        parameters[name].requires_grad_(True)
    return whole, {name: parameters[name] for name in names}


def _with_method(model: Any, job: Job, family: Family) -> tuple[Any, dict[str, nn.Parameter]]:
    """The same with the method in all blocks, and all parameters that it may train."""
    check_whole(job)
    match job.method:
        case Lora():
            add_lora(model, job.method, family.lora_targets)
            reseed_lora(model.named_parameters(), job.training.seed)
        case Prefix():
            return _with_prefix(model, job.method, job.training.seed, family)
        case Prompt():
            return _with_prompt(model, job.method, job.training.seed, family)
        case Full():
            pass
    return model, dict(model.named_parameters())


class _ByLayer(nn.Module):
    """In the place of peft's embedding (n, layers x 2 x G x D): one (n, G, D) for each layer's keys and values."""

    def __init__(self, layers: list[nn.Parameter]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(layers)

    @property
    def weight(self) -> Tensor:
        return torch.cat([values.flatten(1) for values in self.layers], 1)

    def forward(self, virtual: Tensor) -> Tensor:
        return self.weight[virtual]


def _with_prefix(model: Any, method: Prefix, seed: int, family: Family) -> tuple[Any, dict[str, nn.Parameter]]:
    count, config = method.num_virtual_tokens, model.config
    names = [
        name
        for block in range(config.num_hidden_layers)
        for name in prefix.names_in(model.base_model_prefix, family, block)
    ]
    parameters = {name: nn.Parameter(prefix.first_values(config, count, seed, name)) for name in names}
    wrapped = _wrapped(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=count))
    wrapped.prompt_encoder["default"].embedding = _ByLayer(list(parameters.values()))
    return wrapped, parameters


def _with_prompt(model: Any, method: Prompt, seed: int, family: Family) -> tuple[Any, dict[str, nn.Parameter]]:
    embedding, name = model.get_input_embeddings(), prompt.name_in(model.base_model_prefix, family)
    first = prompt.first_values(embedding, method.num_virtual_tokens, seed, name)
    wrapped = _wrapped(
        model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=method.num_virtual_tokens)
    )
    weight = wrapped.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(first)
    return wrapped, {name: weight}


def _wrapped(model: Any, config: Any) -> Any:
    with warnings.catch_warnings():  # of what peft asks transformers
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        return get_peft_model(model, config)
