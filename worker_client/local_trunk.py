"""The trunk at the client itself, for plain FedAvg: rounds go over the link, hidden states and gradients go nowhere."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.job import Job
from shared.model.carve import Part
from shared.model.kv_cache import RowCache
from worker_client.batches import Batch
from worker_client.head_tail import HeadTail
from worker_client.link import Link
from worker_client.remote_trunk import Pending, RemoteTrunk


@dataclass(frozen=True)
class LocalTrunk(RemoteTrunk):
    """Answers like a RemoteTrunk, at once; its parameters' gradients add up in them, for the client's optimizer."""

    part: Part
    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    streams: dict[int, list[RowCache]] = field(default_factory=dict)

    def send_forward(
        self,
        hidden: Tensor,
        batch: Batch,
        *,
        round: int,
        step: int,
        micro_batch: int,
        target_tokens: int,
        wants_gradient: bool,
    ) -> Pending:
        leaf = hidden.detach().requires_grad_(wants_gradient)
        request = self.link.next_request()
        self.graphs[request] = leaf, self._run(leaf, batch.lengths)
        return Pending(request, tuple(hidden.shape), Future())

    def hidden(self, pending: Pending) -> Tensor:
        return self.graphs[pending.request][1].detach()

    def send_backward(self, forward: int, gradient: Tensor) -> Pending:
        _, output = self.graphs[forward]
        if output.requires_grad:
            torch.autograd.backward(output, gradient)
        return Pending(forward, tuple(gradient.shape), Future())

    def gradient(self, pending: Pending) -> Tensor | None:
        return self.graphs.pop(pending.request)[0].grad

    @torch.no_grad()
    def evaluate(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self._run(hidden, batch.lengths)

    @torch.no_grad()
    def generate(self, hidden: Tensor, lengths: Sequence[int], stream: int) -> Tensor:
        return self._run(hidden, lengths, self.streams.setdefault(stream, [RowCache() for _ in lengths]))

    def release(self, stream: int) -> None:
        self.streams.pop(stream, None)

    def _run(self, hidden: Tensor, lengths: Sequence[int], caches: Sequence[RowCache] | None = None) -> Tensor:
        return self.part.forward(hidden.to(self.part.dtype), lengths, caches=caches).float()


def trunk_of(link: Link, job: Job, parts: HeadTail, timeout_s: float, wait_s: float | None = None) -> RemoteTrunk:
    """The trunk that the job's clients train with: the server's, or their own."""
    if parts.trunk is None:
        return RemoteTrunk(link, job, timeout_s, wait_s=wait_s)
    return LocalTrunk(link, job, timeout_s, parts.trunk, wait_s=wait_s)
