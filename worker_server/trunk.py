"""The trunk's arithmetic: packed forwards, one backward a cohort, the optimizer step, its state.

Every client sends the gradient of the mean loss over the n_i target tokens of its step. The trunk's loss is the mean
over all N target tokens of the members present, so client i's gradient enters the backward times n_i / N; on the way
out its rows are divided by the same number, and the head gets the gradient of the client's own mean. One client alone:
n_i / N = 1, and nothing is rounded. With per-client adapters every client is alone in this sense.

Of a forward the graph is kept, so that a step costs one forward and one backward. Rows whose gradient comes after the
backward, and forwards past the memory budget, are computed again, with the parameters and the dropout that their
forward had: the same gradients on all three ways.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from shared.job import Job
from shared.logs import event
from shared.model.carve import Part
from shared.model.kv_cache import RowCache
from shared.model.optimizer import PartOptimizer
from shared.model.residuals import Residuals
from shared.model.trainable import load_trained, trained
from shared.payload.messages import RESIDUAL
from shared.prefixes import under
from worker_server.client_adapters import ClientAdapters
from worker_server.kept import Forward, Graph, Rows, random_state, release_oldest, set_random_state

MAX_KEPT_TOKENS = 2**18
CPU_PIECE_TOKENS = 1024

logger = logging.getLogger(__name__)


class Trunk:
    """Owned by one thread. `device` is where the part lies; graphs of `max_kept_tokens` tokens are kept at most.

    A cohort is computed in pieces of at most `piece_tokens` tokens, or one request if that is longer.
    """

    def __init__(
        self,
        part: Part,
        job: Job,
        device: str = "cpu",
        *,
        max_kept_tokens: int = MAX_KEPT_TOKENS,
        piece_tokens: int | None = None,
    ) -> None:
        self.part = part
        self.job = job
        self.device = device
        self.piece_tokens = piece_tokens or (CPU_PIECE_TOKENS if device == "cpu" else job.cohort.max_batch_tokens)
        self.max_kept_tokens = max_kept_tokens
        per_client = job.cohort.adapters == "per_client"
        self.residuals = Residuals([part] if per_client else [], job)
        self.clients = ClientAdapters(part, job) if per_client else None
        self.parameters = trained([part])
        self.dtype = part.dtype
        self.optimizer = self._fresh_optimizer()
        self.forwards: dict[int, Forward] = {}
        self._in_base = {n: p for n, p in part.base.named_parameters() if p.requires_grad}
        self._version: dict[str, Tensor] | None = None
        self._own: dict[str, Tensor] = {}

    @property
    def steps(self) -> float:
        """Where the optimizer's schedule is."""
        return self.optimizer.steps

    def forward(self, cohort: int, rows: Sequence[Rows]) -> list[Tensor]:
        """Each client's rows through the trunk, (T_i, d) each; kept as number `cohort` for `backward`."""
        self.part.module.train()
        kept = Forward(tuple(rows), self._current_version())
        if self.clients is not None:
            names = [r.client for r in rows]
            self.clients.admit(names)
            kept.own = self.clients.stack(names)
        before = random_state(self.device)
        kept.graphs = self._compute(kept, range(len(rows)))
        if not torch.equal(before, random_state(self.device)):
            kept.random = before
        outputs = [piece for graph in kept.graphs for piece in _unpack(graph.output.detach(), graph.rows(kept))]
        self.forwards[cohort] = kept
        for number in release_oldest(self.forwards, self.max_kept_tokens):
            event(logger, "graph_released", level=logging.DEBUG, cohort=number)
        return outputs

    def backward(self, cohort: int, gradients: Sequence[Tensor | None], *, last: bool = True) -> list[Tensor | None]:
        """One backward for those clients of the cohort whose gradient is here; adds to what `step` will use.

        `gradients`: one (T_i, d) per client of the forward's cohort, None for one that is absent, which then counts
        for nothing; with `last` false it may come in another backward. Returns each client's gradient at the trunk's
        input, or None where it was not wanted.
        """
        kept = self.forwards.pop(cohort)
        present = [place for place, gradient in enumerate(gradients) if gradient is not None]
        if not last:
            self.forwards[cohort] = kept
        results: list[Tensor | None] = [None] * len(gradients)
        if not present:
            return results
        shares = dict(zip(present, self._shares([kept.rows[place] for place in present]), strict=True))
        graphs, kept.graphs = kept.graphs or self._compute_again(kept, present), None
        for graph in graphs:
            scaled = [
                torch.zeros(kept.rows[place].hidden.shape, device=self.device)
                if (gradient := gradients[place]) is None
                else gradient.to(self.device) * shares[place]
                for place in graph.places
            ]
            if graph.output.requires_grad and not shares.keys().isdisjoint(graph.places):
                torch.autograd.backward(graph.output, torch.cat(scaled))
                self._take_own(kept, graph, shares.keys())
            for place, own in zip(graph.places, _input_gradients(kept, graph), strict=True):
                if place in shares and own is not None and kept.rows[place].wants_gradient:
                    results[place] = own / shares[place] if shares[place] else own
        self._take(kept)
        return results

    def step(self, steps: float = 1.0) -> None:
        """One optimizer step with the gradients since the last; the schedule moves on by `steps`.

        Gradients that overflow move nothing.
        """
        if self.clients is not None:
            self.clients.step(self._own)
            self._own = {}
        self._forget_overflow()
        self.optimizer.step(steps)
        self._version = None

    def own_start(self) -> dict[str, Tensor]:
        """What all per-client adapters began the round with, by global name; nothing where all share one."""
        return {} if self.clients is None else self.clients.split(self.clients.average)

    def own_values(self, client: str) -> dict[str, Tensor]:
        """This client's adapter as it is now, named as `own_start`."""
        return {} if self.clients is None else self.clients.split(self.clients.stack([client])[0])

    def end_round(self, own: Mapping[str, Tensor]) -> None:
        """The round is over: per-client adapters go on from `own`, named as `own_start`."""
        self._forget()
        if self.clients is not None:
            average = torch.cat([own[name].flatten() for name in self.clients.shapes])
            self.clients.go_on_from(average, self.steps)

    def take_residuals(self, state: Mapping[str, Tensor]) -> None:
        """Add to the frozen weights what the aggregator's state has for them (FedEx-LoRA), and nothing else."""
        added = under(RESIDUAL, state)
        self.residuals.apply({name: value for name, value in added.items() if name in self.residuals.layers})

    def round_values(self) -> dict[str, Tensor]:
        """What replicas average at a round's end beside all updates: the parameters that all clients train."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def take_round_values(self, values: Mapping[str, Tensor]) -> None:
        """Go on from `values`, named as `round_values`."""
        load_trained(self.parameters, values)
        self._version = None

    @torch.no_grad()
    def evaluate(self, cohort: Sequence[Rows]) -> list[Tensor]:
        """Each client's rows through the trunk, without dropout, without a graph."""
        self.part.module.eval()
        outputs: list[Tensor] = []
        for places in self._pieces(cohort, range(len(cohort))):
            rows = [cohort[place] for place in places]
            if self.clients is not None:
                self.clients.route(self.clients.stack([r.client for r in rows]), [r.lengths for r in rows])
            outputs.extend(_unpack(self._run(_pack(rows), rows), rows))
        return outputs

    @torch.no_grad()
    def generate(self, cohort: Sequence[Rows], caches: Sequence[Sequence[RowCache]]) -> list[Tensor]:
        """Each client's rows, which go on from what their caches hold, through the trunk; the caches grow."""
        self.part.module.eval()
        if self.clients is not None:
            self.clients.route(self.clients.stack([r.client for r in cohort]), [r.lengths for r in cohort])
        flat = [cache for of_client in caches for cache in of_client]
        return _unpack(self._run(_pack(cohort), cohort, caches=flat), cohort)

    def state(self) -> dict[str, Tensor]:
        """Trained parameters (`trunk/...`), optimizer (`optimizer/...`) and random state (`random/torch`).

        With per-client adapters `trunk/...` is their last average; `client/...` holds the rest.
        """
        state = {f"trunk/{name}": p.detach() for name, p in self.parameters.items()}
        state |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
        if self.clients is not None:
            state |= self.clients.state()
        return state | {"random/torch": torch.get_rng_state()}

    def load_state(self, state: Mapping[str, Tensor], steps: float) -> None:
        """Continue from `state()`, taken when the schedule was at `steps`."""
        if self.clients is None:
            load_trained(self.parameters, under("trunk/", state))
        else:
            self.clients.load_state(state, steps)
        self.optimizer = self._fresh_optimizer()
        self.optimizer.load_state(under("optimizer/", state), steps)
        torch.set_rng_state(state["random/torch"])
        self._forget()

    # Inside

    def _fresh_optimizer(self) -> PartOptimizer:
        return PartOptimizer(self.parameters, self.job.training, self.job.total_steps)

    def _current_version(self) -> dict[str, Tensor] | None:
        """A copy of the trained parameters as leaves, one for all forwards between two steps.

        Only where a step may come between a forward and its backward; in lockstep none does.
        """
        if self.job.cohort.mode == "lockstep":
            return None
        if self._version is None:
            self._version = {name: p.detach().clone().requires_grad_() for name, p in self._in_base.items()}
        return self._version

    def _compute(self, kept: Forward, places: Sequence[int]) -> list[Graph]:
        """The rows at `places` of the cohort, in pieces of at most `piece_tokens` tokens."""
        graphs: list[Graph] = []
        for piece in self._pieces(kept.rows, places):
            rows = [kept.rows[place] for place in piece]
            own = None
            if self.clients is not None and kept.own is not None:
                # The leaf is a copy: a backward uses what its forward used, whatever was stepped in between.
                own = kept.own if len(piece) == len(kept.own) else kept.own[piece]
                own = own.detach().requires_grad_()
                self.clients.route(own, [r.lengths for r in rows])
            hidden = _pack(rows).to(self.device).requires_grad_(any(r.wants_gradient for r in rows))
            graphs.append(Graph(tuple(piece), hidden, self._run(hidden, rows, kept.weights), own))
        return graphs

    def _compute_again(self, kept: Forward, places: Sequence[int]) -> list[Graph]:
        """The forward of these rows once more; with dropout that of all rows, so that it drops the same."""
        self.part.module.train()
        if kept.random is None:
            return self._compute(kept, places)
        now = random_state(self.device)
        set_random_state(kept.random, self.device)
        try:
            return self._compute(kept, range(len(kept.rows)))
        finally:
            set_random_state(now, self.device)

    def _run(
        self,
        hidden: Tensor,
        rows: Sequence[Rows],
        weights: Mapping[str, Tensor] | None = None,
        caches: Sequence[RowCache] | None = None,
    ) -> Tensor:
        lengths = [length for r in rows for length in r.lengths]
        return self.part.forward(hidden.to(self.device, self.dtype), lengths, weights, caches).float()

    def _take(self, kept: Forward) -> None:
        """Hand the gradients of a version's leaves to the parameters."""
        for name, leaf in (kept.weights or {}).items():
            parameter = self._in_base[name]
            if leaf.grad is not None:
                parameter.grad = leaf.grad if parameter.grad is None else parameter.grad + leaf.grad
                leaf.grad = None

    def _take_own(self, kept: Forward, graph: Graph, present: Collection[int]) -> None:
        """Add up the gradient of each present client's adapter, (P,)."""
        if graph.own is None or graph.own.grad is None:
            return
        for place, gradient in zip(graph.places, graph.own.grad, strict=True):
            if place in present:
                client = kept.rows[place].client
                self._own[client] = self._own[client] + gradient if client in self._own else gradient

    def _forget(self) -> None:
        """Let go of all that waits for a gradient or a step."""
        self.forwards, self._own, self._version = {}, {}, None
        for parameter in self.parameters.values():
            parameter.grad = None

    def _forget_overflow(self) -> None:
        """One client's huge numbers, finite when they came, must not become everyone's NaN."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients and not bool(torch.stack([g.isfinite().all() for g in gradients]).all()):
            event(logger, "step_overflowed", level=logging.WARNING, step=self.optimizer.steps)
            for parameter in self.parameters.values():
                parameter.grad = None

    def _shares(self, present: Sequence[Rows]) -> list[float]:
        """What each one's mean loss counts in the loss that its gradient belongs to: n_i / N."""
        loss_of = ["" if self.clients is None else rows.client for rows in present]
        totals: Counter[str] = Counter()
        for rows, loss in zip(present, loss_of, strict=True):
            totals[loss] += rows.target_tokens
        return [
            rows.target_tokens / totals[loss] if totals[loss] else 0.0
            for rows, loss in zip(present, loss_of, strict=True)
        ]

    def _pieces(self, cohort: Sequence[Rows], places: Sequence[int]) -> list[list[int]]:
        """The places in forwards of at most `piece_tokens` tokens; a step remains one optimizer step."""
        pieces: list[list[int]] = []
        room = 0
        for place in places:
            tokens = cohort[place].tokens
            if not pieces or tokens > room:
                pieces.append([])
                room = self.piece_tokens
            pieces[-1].append(place)
            room -= tokens
        return pieces


def _pack(rows: Sequence[Rows]) -> Tensor:
    return torch.cat([r.hidden for r in rows])


def _unpack(packed: Tensor, rows: Sequence[Rows]) -> list[Tensor]:
    return list(torch.split(packed, [r.tokens for r in rows]))


def _input_gradients(kept: Forward, graph: Graph) -> list[Tensor | None]:
    if graph.hidden.grad is None:
        return [None] * len(graph.places)
    return list(_unpack(graph.hidden.grad, graph.rows(kept)))
