"""Multi-Krum (Blanchard et al., NIPS 2017): the mean of the m updates with the lowest Krum scores.

m = n - f - 2, as in AggregaThor (Damaskinos et al., SysML 2019). Those chosen count the same, whatever they say they
weigh.
"""

from collections.abc import Sequence

from torch import Tensor

from shared.job import Job
from worker_server.aggregators.krum import ranking
from worker_server.aggregators.method import Method, Tensors, Update, add, differences


def multi_krum(job: Job, start: Tensors, updates: Sequence[Update]) -> dict[str, Tensor] | None:
    ranked = ranking(job, start, updates)
    if ranked is None:
        return None
    places, byzantine = ranked
    chosen = [updates[place] for place in sorted(places[: len(updates) - byzantine - 2])]
    return {name: differences(start, chosen, name).mean(dim=0) for name in start}


METHOD = Method(multi_krum, add)
