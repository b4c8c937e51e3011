"""What the adaptive server optimizers of Reddi et al. (arXiv 2003.00295, algorithm 2) have in common.

With the clients' mean change d, rate r and adaptivity tau, per coordinate: m = beta_1 m + (1 - beta_1) d; v follows
d^2, each optimizer in its own way; w = w + r m / (sqrt(v) + tau). m begins at 0, v at tau^2; no bias is corrected.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shared.job import Adaptive, Job
from worker_server.aggregators.method import Change, Step, Tensors

# v after a round from v before it, d^2 and beta_2.
Second = Callable[[Tensor, Tensor, float], Tensor]


def stepping(second: Second) -> Step:
    """The optimizer whose second moment follows `second`."""

    def step(job: Job, start: Tensors, change: Change, state: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        settings = job.aggregation
        assert isinstance(settings, Adaptive)
        values: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, value in start.items():
            delta = change.delta[name].double()
            m = _before(state, f"m/{name}", torch.zeros_like(delta))
            v = _before(state, f"v/{name}", torch.full_like(delta, settings.tau**2))
            m = settings.beta_1 * m + (1 - settings.beta_1) * delta
            v = second(v, delta.square(), settings.beta_2)
            values[name] = (value.double() + settings.server_learning_rate * m / (v.sqrt() + settings.tau)).float()
            moments[f"m/{name}"], moments[f"v/{name}"] = m.float(), v.float()
        return values, moments

    return step


def _before(state: Tensors, key: str, beginning: Tensor) -> Tensor:
    """The moment after the last round, float64; `beginning` where there was none."""
    return state[key].to(beginning.device, beginning.dtype) if key in state else beginning
