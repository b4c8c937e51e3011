"""Random values that depend on a seed and a name alone: the same wherever, and in whatever order, they are drawn."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shared.errors import ModelError

PIECE = 2**20
# Those of torch.nn.init that draw, but for `normal_`.
RANDOM = {
    "uniform_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
    "orthogonal_", "sparse_",
}  # fmt: skip


def generator_of(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the tensor of that name in the whole model."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_weights(module: nn.Module, initializer: Any, names: Mapping[str, str], seed: int) -> None:
    """Give the parameters in `names` (name in the module to name in the whole model) their first values, float32.

    What they are, `initializer` says, the family's model for the whole configuration, which may be without weights:
    by its `_init_weights`, whose normal numbers come from `seed` and the whole model's names. Raises ModelError for a
    family that begins with other random numbers.
    """
    for local in names:
        owner, _, leaf = local.rpartition(".")
        parameter = getattr(module.get_submodule(owner), leaf)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(torch.empty(parameter.shape, device="cpu")))
    named = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad(), _ByName({id(named[local]): name for local, name in names.items()}, seed):
        for part in reversed(list(module.modules())):  # children first, as transformers does
            if type(part).__name__ != "GPTNeoSelfAttention":  # whose mask alone is set there, and is not needed
                initializer._init_weights(part)


class _ByName(TorchFunctionMode):
    """While it is on, `normal_` draws for each tensor by its name, and leaves others alone.

    Functions go by their names: transformers replaces those of nn.init, for all threads, while it builds a model.
    Drawn in float64, then rounded: float32 is drawn another way where the processor has AVX2.
    """

    def __init__(self, names: Mapping[int, str], seed: int) -> None:
        super().__init__()
        self.names = names
        self.seed = seed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in RANDOM:
            raise ModelError(f"training.from_scratch: this family draws by {name}, which is not known here")
        if name != "normal_":
            return func(*args, **(kwargs or {}))
        return self._normal(*args, **(kwargs or {}))

    def _normal(self, tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: object = None) -> Tensor:
        name = self.names.get(id(tensor))
        if name is not None:
            generator = generator_of(self.seed, name)
            for piece in torch.split(tensor.view(-1), PIECE):
                piece.copy_(torch.empty(len(piece), dtype=torch.float64).normal_(mean, std, generator=generator))
        return tensor
