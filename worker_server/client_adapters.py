"""The clients' own adapters: who has which, their optimizers, what they begin a round with, their state.

A client's adapter is one flat vector (P,) of all its LoRA weights, or of its prefixes in all layers; those that are
trained are its own. They take the gradient of that client's own mean loss and step by an optimizer of their own, as if
the client had a server for itself ("server-hierarchical" in the appendix of FL-GLM, arXiv 2406.14898). Moments stay
with their clients; schedules go by the job's steps, for who sat a round out as well; weights are aggregated with those
of head and tail, as one update of that client.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from shared.job import Job, Prefix
from shared.logs import event
from shared.model.carve import Part
from shared.model.optimizer import PartOptimizer
from shared.prefixes import under
from worker_server.per_client import Routing, take_adapters
from worker_server.per_client_prefix import take_prefixes

VECTOR = "adapter"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientAdapter:
    vector: nn.Parameter
    optimizer: PartOptimizer


class ClientAdapters:
    """Adapters of up to `cohort.clients` clients, by name; who is new begins with the last average, (P,) float32."""

    def __init__(self, part: Part, job: Job) -> None:
        """Takes peft's layers, or the prefixes, out of `part`. Raises JobError for layers other than linear ones."""
        self.training = job.training
        self.total_steps = job.total_steps
        self.limit = job.cohort.clients
        self.proximal_mu = job.aggregation.proximal_mu
        self.routing = Routing()
        take = take_prefixes if isinstance(job.method, Prefix) else take_adapters
        first = take(part, self.routing)
        self.shapes = {name: value.shape for name, value in first.items()}
        self.average = torch.cat([value.flatten() for value in first.values()])
        self.learnt = _positions(self.shapes, job).to(self.average.device)
        self.clients: dict[str, ClientAdapter] = {}
        self.done: Counter[str] = Counter()
        self.position = 0.0  # of the schedules, where the round began

    def admit(self, names: Iterable[str]) -> None:
        """Let all of `names` have an adapter. Past the limit, others lose theirs, who stepped least first.

        Who is not of this round loses its moments alone: its weights are the average.
        """
        wanted = dict.fromkeys(names)
        others = sorted(self.clients.keys() - wanted.keys(), key=lambda name: (self.done[name], name))
        excess = len(self.clients.keys() | wanted.keys()) - self.limit
        for name in others[: max(0, excess)]:
            del self.clients[name], self.done[name]
        for name in wanted:
            if name not in self.clients:
                self.clients[name] = self._adapter(self.average[self.learnt])

    def stack(self, names: Sequence[str]) -> Tensor:
        """A copy of the weights of each client named, (c, P); the average for one that has none of its own."""
        stacked = self.average.repeat(len(names), 1)
        for row, name in zip(stacked, names, strict=True):
            if name in self.clients:
                row[self.learnt] = self.clients[name].vector.detach()
        return stacked

    def route(self, weights: Tensor, lengths: Sequence[Sequence[int]]) -> None:
        """Let the next forward's rows, of `lengths` tokens by client, go through that client's `weights` (c, P)."""
        sizes = [prod(shape) for shape in self.shapes.values()]
        self.routing.set(lengths, torch.split(weights, sizes, 1), weights.device)

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One optimizer step of each client named, with its gradient (P,), and FedProx's. One that overflows moves
        nothing.
        """
        for name, gradient in gradients.items():
            adapter = self.clients[name]
            if bool(gradient.isfinite().all()):
                drift = adapter.vector.detach() - self.average[self.learnt]
                adapter.vector.grad = gradient[self.learnt] + self.proximal_mu * drift
            else:
                event(logger, "step_overflowed", level=logging.WARNING, client=name, step=adapter.optimizer.steps)
            adapter.optimizer.step()
            self.done[name] += 1

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (P,) as peft's A and B, by global name: views."""
        pieces = torch.split(vector, [prod(shape) for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def go_on_from(self, average: Tensor, position: float) -> None:
        """Let every client continue with these weights, (P,), at this place of its schedule."""
        self.average, self.position = average, position
        with torch.no_grad():
            for adapter in self.clients.values():
                adapter.vector.copy_(self.average[self.learnt])
                adapter.optimizer.move_to(position)

    def state(self) -> dict[str, Tensor]:
        """The average as `trunk/<parameter>`, shaped as peft has it; the rest as `client/<name>/...`."""
        state = {f"trunk/{name}": piece.clone() for name, piece in self.split(self.average).items()}
        for client, adapter in self.clients.items():
            state[f"client/{client}/{VECTOR}"] = adapter.vector.detach().clone()
            state[f"client/{client}/steps"] = torch.tensor(adapter.optimizer.steps, dtype=torch.float64)
            state[f"client/{client}/done"] = torch.tensor(self.done[client])
            for name, value in adapter.optimizer.state().items():
                state[f"client/{client}/optimizer/{name}"] = value
        return state

    def load_state(self, state: Mapping[str, Tensor], position: float) -> None:
        """Continue from `state()`, taken when the job's schedule was at `position`."""
        self.position = position
        self.done = Counter()
        device = self.average.device
        self.average = torch.cat([state[f"trunk/{name}"].flatten() for name in self.shapes]).to(device)
        self.clients = {}
        for client in sorted(
            name.split("/")[1] for name in state if name.startswith("client/") and name.endswith("/steps")
        ):
            kept = under(f"client/{client}/", state)
            adapter = self._adapter(kept[VECTOR].to(device, copy=True))
            adapter.optimizer.load_state(under("optimizer/", kept), float(kept["steps"]))
            self.clients[client] = adapter
            self.done[client] = int(kept["done"])

    def _adapter(self, values: Tensor) -> ClientAdapter:
        vector = nn.Parameter(values)
        optimizer = PartOptimizer({VECTOR: vector}, self.training, self.total_steps)
        optimizer.move_to(self.position)
        return ClientAdapter(vector, optimizer)


def _positions(shapes: Mapping[str, Sequence[int]], job: Job) -> Tensor:
    """Where in the vector lies what is trained, int64: all of it, or with aggregation.lora=freeze_a B alone."""
    frozen = job.aggregation.lora == "freeze_a"
    pieces = [torch.full((prod(shape),), not (frozen and ".lora_A." in name)) for name, shape in shapes.items()]
    return torch.cat(pieces).nonzero().squeeze(1)
