"""The trunk's arithmetic: packed forwards, one backward a cohort, the optimizer step, its state.

Every client sends the gradient of the mean loss over its own n_i target tokens. The trunk's loss is the mean over all
N target tokens of the cohort, so client i's gradient enters the backward times n_i / N; on the way out its rows are
divided by the same number, and the head gets the gradient of the client's own mean. One client alone: n_i / N = 1, and
nothing is rounded. With per-client adapters every client is alone in this sense.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.job import Job
from shared.logs import event
from shared.model.carve import Part
from shared.model.optimizer import PartOptimizer
from shared.model.trainable import load_trained, trained
from worker_server.client_adapters import ClientAdapters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """One client's rows in a cohort: hidden (T, d) float32, row lengths, target tokens, whether it wants a gradient.

    `client`: its name, by which per-client adapters are told apart.
    """

    hidden: Tensor
    lengths: tuple[int, ...]
    target_tokens: int
    wants_gradient: bool
    client: str = ""


@dataclass(frozen=True)
class Graph:
    """A forward that waits for its gradients: the trunk's input and output leaves, (T, d) each.

    `weights`: with per-client adapters, those of each of `rows`, (rows, P), as the forward used them.
    """

    rows: tuple[Rows, ...]
    hidden: Tensor
    output: Tensor
    weights: Tensor | None = None


class Trunk:
    """Owned by one thread. `device` is where the part lies."""

    def __init__(self, part: Part, job: Job, device: str = "cpu") -> None:
        self.part = part
        self.job = job
        self.device = device
        self.max_batch_tokens = job.cohort.max_batch_tokens
        self.clients = ClientAdapters(part, job) if job.cohort.adapters == "per_client" else None
        self.parameters = trained([part])
        self.optimizer = self._fresh_optimizer()
        self.graphs: list[Graph] = []

    def forward(self, cohort: Sequence[Rows]) -> list[Tensor]:
        """Each client's rows through the trunk, (T_i, d) each; keeps the graph for `backward`."""
        self.part.module.train()
        self.graphs = []
        if self.clients is not None:
            self.clients.admit(rows.client for rows in cohort)
        outputs: list[Tensor] = []
        for rows in self._chunks(cohort):
            weights = self._enter(rows, train=True)
            hidden = self._pack(rows).requires_grad_(any(r.wants_gradient for r in rows))
            output = self.part.forward(hidden, _lengths(rows))
            self.graphs.append(Graph(tuple(rows), hidden, output, weights))
            outputs.extend(_unpack(output.detach(), rows))
        return outputs

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One backward of the kept graph and one optimizer step.

        `gradients`: one (T_i, d) per client of the forward's cohort, None for one that is absent, which then counts
        for nothing. Returns each client's gradient at the trunk's input, or None where it was not wanted. A step whose
        gradients overflow moves nothing.
        """
        present = [g is not None for g in gradients]
        cohort = [rows for graph in self.graphs for rows in graph.rows]
        shares = iter(self._shares(cohort, present))
        remaining = iter(gradients)
        results: list[Tensor | None] = []
        for graph in self.graphs:
            mine = [next(remaining) for _ in graph.rows]
            own_shares = [next(shares) for _ in graph.rows]
            if graph.output.requires_grad:
                scaled = [
                    torch.zeros(rows.hidden.shape, device=self.device) if g is None else g.to(self.device) * share
                    for rows, g, share in zip(graph.rows, mine, own_shares, strict=True)
                ]
                torch.autograd.backward(graph.output, torch.cat(scaled))
            for rows, g, share, own in zip(graph.rows, mine, own_shares, _input_gradients(graph), strict=True):
                wanted = rows.wants_gradient and g is not None and own is not None
                results.append(own / share if wanted and own is not None and share else None)
        if self.clients is not None:
            self.clients.step(_by_client(self.graphs, present))
        self.graphs = []
        self._forget_overflow()
        self.optimizer.step()
        return results

    def end_round(self, weights: Mapping[str, int]) -> None:
        """The clients named complete a round, weighted so: per-client adapters are averaged."""
        if self.clients is not None:
            self.clients.end_round(weights)

    @torch.no_grad()
    def evaluate(self, cohort: Sequence[Rows]) -> list[Tensor]:
        """Each client's rows through the trunk, without dropout, without a graph."""
        self.part.module.eval()
        outputs: list[Tensor] = []
        for rows in self._chunks(cohort):
            self._enter(rows, train=False)
            outputs.extend(_unpack(self.part.forward(self._pack(rows), _lengths(rows)), rows))
        return outputs

    def state(self) -> dict[str, Tensor]:
        """Trained parameters (`trunk/...`), optimizer (`optimizer/...`) and random state (`random/torch`).

        With per-client adapters `trunk/...` is their last average; `client/...` holds the rest.
        """
        state = {f"trunk/{name}": p.detach() for name, p in self.parameters.items()}
        state |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
        if self.clients is not None:
            state |= self.clients.state()
        return state | {"random/torch": torch.get_rng_state()}

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from `state()`, taken after `steps` optimizer steps."""
        if self.clients is None:
            load_trained(self.parameters, _under("trunk/", state))
        else:
            self.clients.load_state(state)
        self.optimizer = self._fresh_optimizer()
        self.optimizer.load_state(_under("optimizer/", state), steps)
        torch.set_rng_state(state["random/torch"])
        self.graphs = []

    def _fresh_optimizer(self) -> PartOptimizer:
        return PartOptimizer(self.parameters, self.job.training, self.job.total_steps)

    def _forget_overflow(self) -> None:
        """One client's huge numbers, finite when they came, must not become everyone's NaN."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients and not bool(torch.stack([g.isfinite().all() for g in gradients]).all()):
            event(logger, "step_overflowed", level=logging.WARNING, step=self.optimizer.steps)
            for parameter in self.parameters.values():
                parameter.grad = None

    def _enter(self, rows: Sequence[Rows], *, train: bool) -> Tensor | None:
        """Route the next forward of these rows through their clients' own adapters, where there are such."""
        if self.clients is None:
            return None
        return self.clients.enter([r.client for r in rows], [sum(r.lengths) for r in rows], train=train)

    def _shares(self, cohort: Sequence[Rows], present: Sequence[bool]) -> list[float]:
        """What each one's mean loss counts in the loss that its gradient belongs to: n_i / N, over who is present."""
        loss_of = ["" if self.clients is None else rows.client for rows in cohort]
        totals: Counter[str] = Counter()
        for rows, loss, here in zip(cohort, loss_of, present, strict=True):
            totals[loss] += rows.target_tokens if here else 0
        return [
            rows.target_tokens / totals[loss] if totals[loss] else 0.0
            for rows, loss in zip(cohort, loss_of, strict=True)
        ]

    def _pack(self, rows: Sequence[Rows]) -> Tensor:
        return torch.cat([r.hidden for r in rows]).to(self.device)

    def _chunks(self, cohort: Sequence[Rows]) -> list[list[Rows]]:
        """The cohort in forwards of at most `max_batch_tokens` tokens; a step remains one optimizer step."""
        chunks: list[list[Rows]] = []
        room = 0
        for rows in cohort:
            tokens = sum(rows.lengths)
            if not chunks or tokens > room:
                chunks.append([])
                room = self.max_batch_tokens
            chunks[-1].append(rows)
            room -= tokens
        return chunks


def _lengths(rows: Sequence[Rows]) -> list[int]:
    return [length for r in rows for length in r.lengths]


def _unpack(packed: Tensor, rows: Sequence[Rows]) -> list[Tensor]:
    return list(torch.split(packed, [sum(r.lengths) for r in rows]))


def _input_gradients(graph: Graph) -> list[Tensor | None]:
    if graph.hidden.grad is None:
        return [None] * len(graph.rows)
    return list(_unpack(graph.hidden.grad, graph.rows))


def _by_client(graphs: Sequence[Graph], present: Sequence[bool]) -> dict[str, Tensor]:
    """The gradient of each present client's adapter, (P,)."""
    gradients: dict[str, Tensor] = {}
    here = iter(present)
    for graph in graphs:
        assert graph.weights is not None
        assert graph.weights.grad is not None
        for rows, gradient in zip(graph.rows, graph.weights.grad, strict=True):
            if next(here):
                earlier = gradients.get(rows.client)
                gradients[rows.client] = gradient if earlier is None else earlier + gradient
    return gradients


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
