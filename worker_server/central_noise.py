"""Central differential privacy of a round: Gaussian noise on the mean of bounded updates (DP-FedAvg, McMahan et al.,
arXiv 1710.06963, algorithm 1).

With n updates of L2 norm clip_norm at most, all counting alike, taking one out (its sender changed nothing) moves their
mean by clip_norm / n at most: the noise is noise_multiplier times that, on every number that is trained. What a server
optimizer makes of the noised mean costs nothing more.
"""

import os
from collections.abc import Mapping

from torch import Tensor

from shared.job import CentralPrivacy, Job
from shared.model.gaussian import RandomBytes, gaussian
from worker_server.replicas import Replicas


def noised(
    job: Job,
    mean: Mapping[str, Tensor],
    updates: int,
    replicas: Replicas | None = None,
    random_bytes: RandomBytes = os.urandom,
) -> dict[str, Tensor]:
    """The mean of so many updates, float64, with noise where the job says central. Replicas add the first one's."""
    privacy = job.privacy
    if not isinstance(privacy, CentralPrivacy):
        return dict(mean)
    std = privacy.noise_multiplier * privacy.clip_norm / updates
    noise = {n: gaussian(value.shape, std, random_bytes) for n, value in mean.items() if _is_trained(job, n)}
    if replicas is not None:
        noise = replicas.mean(noise, weight=int(replicas.place.replica == 0))
    return {name: value + noise[name].to(value.device) if name in noise else value for name, value in mean.items()}


def _is_trained(job: Job, name: str) -> bool:
    """Per-client adapters hold A, trained or not."""
    return not (job.aggregation.lora == "freeze_a" and ".lora_A." in name)
