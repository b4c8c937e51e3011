"""Which jobs mask the updates of head and tail, and how many neighbours help to unmask: from the job alone.

Both sides compute this by themselves; neither takes it from the other.
"""

from typing import TYPE_CHECKING, Literal

from shared.secure_aggregation import graph
from shared.secure_aggregation.terms import MIN_CLIENTS

if TYPE_CHECKING:
    from shared.job.job import Job

Secure = Literal["secagg", "secagg+", "ring", "off"]

CLIP = 1024.0
"""What a masked update's values are clipped to, and that is counted. None goes so far in a round that is of any use."""

# SecAgg+ is laid out for so many clients that help the server.
CORRUPT_SHARE = 0.1


def secure_of(job: "Job") -> Secure:
    """`aggregation.secure` where it says something, else SecAgg wherever a sum hides anything."""
    if job.aggregation.secure is not None:
        return job.aggregation.secure
    return "off" if why_off(job) else "secagg"


def why_off(job: "Job") -> str | None:
    """Why this job's updates are not masked, for people; None if they are."""
    if job.aggregation.secure in ("secagg", "secagg+", "ring"):
        return None
    if not job.handed_in:
        return "nothing of head and tail is trained, so no update leaves a client"
    if job.aggregation.secure == "off":
        return "aggregation.secure=off: the server sees every client's update"
    if job.cohort.members < MIN_CLIENTS:
        return (
            f"rounds of {job.cohort.members} clients (cohort.clients, cohort.sampled): a sum of fewer than "
            f"{MIN_CLIENTS} hides nothing, so the server sees every client's update"
        )
    return None


def seen_of(job: "Job") -> str:
    """What others see of updates that are masked, for people: what the job's kind of sum promises, and no more."""
    if job.secure == "ring":
        return (
            "the server sees their sum alone; with the help of the two members next to a client in the ring, its update"
        )
    if job.aggregation.group_key is not None:
        return "the server sees not even their sum"
    return "the server sees their sum alone"


def neighbourhood(job: "Job", members: int) -> tuple[int, int]:
    """(neighbours, threshold) of each in a round of so many members.

    SecAgg: all others, and a threshold as high as the quorum permits: what `cohort.quorum` clients can unmask. It is
    always more than half of the neighbours, so that more members than `cohort.clients` may need more than the quorum.
    SecAgg+ (`graph.choose`): for a tenth of the members helping the server, and as many dropping out as the quorum
    permits; where that comes to nearly all others, or cannot be had, the same as SecAgg.
    """
    others = members - 1
    if job.secure == "secagg+":
        dropped = max(0, members - server_quorum(job)) / members
        try:
            neighbours, threshold = graph.choose(members, corrupt=CORRUPT_SHARE, dropped=dropped)
        except ValueError:
            neighbours = others
        if neighbours < others:
            return neighbours, threshold
    return others, max(min(server_quorum(job) - 1, others), others // 2 + 1)


def server_quorum(job: "Job") -> int:
    """The quorum of one server: of its share of the clients if there are replicas."""
    cohort = job.cohort
    if cohort.replicas == 1:
        return cohort.effective_quorum
    share = cohort.clients // cohort.replicas
    return share if cohort.effective_quorum == cohort.clients else least_quorum(share)


def least_quorum(clients: int) -> int:
    """The smallest quorum of so many clients that more than half of each one's neighbours are still there."""
    return (clients - 1) // 2 + 2
