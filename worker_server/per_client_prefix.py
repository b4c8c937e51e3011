"""Each row attends to its own client's prefix, in one packed forward of the trunk (shared/model/methods/prefix.py)."""

from torch import Tensor, nn

from shared.model.carve import Part
from shared.model.methods.prefix import LayerPrefix
from worker_server.per_client import Routing


class PerClientPrefix(nn.Module):
    """In the place of a layer's prefix: the keys and values of whoever's rows come, from `routing`."""

    def __init__(self, prefix: LayerPrefix, routing: Routing, index: int) -> None:
        super().__init__()
        self.shape = prefix.keys.shape
        self.routing = routing
        self.index = index

    def of_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (rows, G, n, D) each."""
        owners = self.routing.row_owners
        keys, values = (
            by_client.view(-1, *self.shape).transpose(1, 2).index_select(0, owners)
            for by_client in self.routing.weights[2 * self.index : 2 * self.index + 2]
        )
        return keys, values


def take_prefixes(part: Part, routing: Routing) -> dict[str, Tensor]:
    """Put a PerClientPrefix, in place, where prefixes are; what these held, keys and values in turn, by global name."""
    taken: dict[str, Tensor] = {}
    prefixes = [(name, m) for name, m in part.module.named_modules() if isinstance(m, LayerPrefix)]
    for index, (name, prefix) in enumerate(prefixes):
        taken[part.global_name(f"{name}.keys")] = prefix.keys.detach()
        taken[part.global_name(f"{name}.values")] = prefix.values.detach()
        part.module.set_submodule(name, PerClientPrefix(prefix, routing, index))
    return taken
