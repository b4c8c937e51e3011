"""FedAdam (Reddi et al., arXiv 2003.00295, algorithm 2): v = beta_2 v + (1 - beta_2) d^2."""

from torch import Tensor

from worker_server.aggregators.adaptive import stepping
from worker_server.aggregators.fedavg import weighted_mean
from worker_server.aggregators.method import Method


def second(v: Tensor, squared: Tensor, beta_2: float) -> Tensor:
    return beta_2 * v + (1 - beta_2) * squared


METHOD = Method(weighted_mean, stepping(second))
