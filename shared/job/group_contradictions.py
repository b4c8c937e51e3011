"""What a group's key does not go with: all for which the server needs the averages that it keeps from it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shared.job.privacy import CentralPrivacy

if TYPE_CHECKING:
    from shared.job.job import Job


def group(job: "Job") -> Iterator[str]:
    aggregation, wire = job.aggregation, job.wire
    name = "aggregation.group_key"
    if aggregation.group_key is None:
        return
    if job.secure == "off":
        yield (
            f"{name} keeps the masked sum from the server, and this job masks nothing (aggregation.secure=off, fewer "
            "than three clients a round, or nothing of head and tail trained)"
        )
    if job.secure == "ring":
        yield f"{name} is for sums that some may drop out of: set aggregation.secure=secagg or secagg+"
    if aggregation.type != "fedavg":
        yield f"{name} hides the mean that aggregation.type={aggregation.type} goes on from: set fedavg"
    if isinstance(job.privacy, CentralPrivacy):
        yield f"{name} hides the mean that the server adds noise to in privacy.type=central: set privacy.type=local"
    if wire.compresses_averages:
        yield (
            f"{name} hides the averages of which wire.average={wire.average}, wire.average_density="
            f"{wire.average_density:g} send part: set float32 and 1.0"
        )
    if job.cohort.replicas > 1:
        yield f"{name} hides the sums that cohort.replicas={job.cohort.replicas} servers average: run one"
