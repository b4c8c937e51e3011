"""Prefix tuning: trained keys and values of virtual tokens before each row, in every layer.

P-tuning v2 (arXiv 2110.07602, section 3.2), as FL-GLM trains it (arXiv 2406.14898); prefix tuning (arXiv 2101.00190)
without its projection. Exactly peft's PrefixTuning: keys and values are used as they are, without rotary embedding, and
a row's own positions begin after the virtual ones. In a layer with a sliding window, tokens further than that from the
row's beginning see no prefix.

Each layer's lie where the layer lies, beside its attention, where shared/model/packing.py finds them, so that nothing
of them travels. They begin as peft's do, normal with deviation 1, drawn from the job's seed and the tensor's name
in the whole model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from shared.job import Job, Prefix
from shared.model.carve import Part
from shared.model.draws import generator_of
from shared.model.families import Family
from shared.model.packing import PREFIX


class LayerPrefix(nn.Module):
    """One layer's: `keys` and `values`, (n, G, D) float32 each, the same for every row."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def of_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (rows, G, n, D) each."""
        keys, values = (x.transpose(0, 1).expand(rows, -1, -1, -1) for x in (self.keys, self.values))
        return keys, values


def add(part: Part, job: Job) -> None:
    assert isinstance(job.method, Prefix)
    for index, block in enumerate(getattr(part.base, part.family.blocks)):
        attention = block.get_submodule(part.family.attention)
        device = next(attention.parameters()).device
        keys, values = (
            first_values(part.config, job.method.num_virtual_tokens, job.training.seed, name).to(device)
            for name in names_in(part.module.base_model_prefix, part.family, part.plan.blocks(part.name)[index])
        )
        setattr(attention, PREFIX, LayerPrefix(keys, values))


def names_in(base_model_prefix: str, family: Family, block: int) -> tuple[str, str]:
    """Names in the whole model of the keys and the values of one block."""
    where = f"{base_model_prefix}.{family.blocks}.{block}.{family.attention}.{PREFIX}"
    return f"{where}.keys", f"{where}.values"


def first_values(config: Any, count: int, seed: int, name: str) -> Tensor:
    """(count, G, D) float32 on the CPU, for the tensor of that name."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return torch.empty(count, groups, width, device="cpu").normal_(generator=generator_of(seed, name))
