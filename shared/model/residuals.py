"""What is added to frozen weights beside adapters, so that averaged factors stand for the average of their products.

FedEx-LoRA (Singhal et al., arXiv 2410.09432): with clients' factors B_i (out, r) and A_i (r, in), the mean of B_i A_i
is mean(B) mean(A) plus a residual (out, in), which goes into the frozen weight, times the adapters' scaling.
"""

from collections.abc import Iterable, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.errors import JobError, TensorError
from shared.job import Job
from shared.model.carve import Part
from shared.model.methods.lora import ADAPTER

FACTOR_A, FACTOR_B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules whose adapters' weights are among `names`, by global name."""
    return [name.removesuffix(FACTOR_A) for name in names if name.endswith(FACTOR_A)]


class Residuals:
    """The layers of some parts that have adapters, and what their weights were. Empty unless the job asks for it."""

    def __init__(self, parts: Iterable[Part], job: Job) -> None:
        """Raises JobError if one is neither linear nor GPT-2's transposed kind."""
        self.layers: dict[str, tuple[nn.Linear | Conv1D, float]] = {}
        self.added: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        if job.aggregation.lora != "exact":
            return
        for part in parts:
            for name, layer in part.module.named_modules():
                if isinstance(layer, LoraLayer):
                    base = layer.get_base_layer()
                    if not isinstance(base, nn.Linear | Conv1D):
                        raise JobError(
                            f"method.target_modules: {name} is no linear layer; aggregation.lora=exact needs those"
                        )
                    self.layers[part.global_name(name)] = base, layer.scaling[ADAPTER]

    def apply(self, residuals: Mapping[str, Tensor]) -> None:
        """Let the weights be what they were at first plus these, (out, in) by module; nothing where one is absent.

        Raises TensorError if one is of no such layer or does not fit it; nothing changes then.
        """
        self._check(residuals)
        self.put({name: value * self.layers[name][1] for name, value in residuals.items()})

    def put(self, added: Mapping[str, Tensor]) -> None:
        """The same with what is `added` to the weights of other such layers: residuals times their scaling."""
        self._check(added)
        self.added = {}
        with torch.no_grad():
            for name, (layer, _) in self.layers.items():
                weight = _out_in(layer)
                if name in added:
                    before = self._before.setdefault(name, weight.detach().clone())
                    self.added[name] = added[name].to(weight.device)
                    weight.copy_(before + self.added[name])
                elif name in self._before:
                    weight.copy_(self._before[name])

    def _check(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if name not in self.layers or value.shape != _out_in(self.layers[name][0]).shape:
                raise TensorError(f"a residual that does not fit this model: {name!r}")


def _out_in(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight, (out, in): a view."""
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight
