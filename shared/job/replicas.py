"""Whether several servers may train a job together: each of them knows only its own clients."""

from shared.errors import JobError
from shared.job.job import Job
from shared.secure_aggregation.terms import MIN_CLIENTS


def check_replicas(job: Job, replicas: int) -> None:
    """Raises JobError unless so many servers, or the one, may. What the job's settings alone contradict was refused."""
    if job.secure != "off" and replicas != job.cohort.replicas:
        raise JobError(
            f"{replicas} replicas, and the job says cohort.replicas={job.cohort.replicas}: with "
            f"aggregation.secure={job.secure} clients must know among how few of them each sum may be",
            hint=f"set cohort.replicas={replicas} (every replica needs {MIN_CLIENTS} clients), or "
            "aggregation.secure=off: the servers then see every client's update",
        )
    if replicas == 1:
        return
    if replicas > job.cohort.clients:
        raise JobError(f"{replicas} replicas for {job.cohort.clients} clients (cohort.clients)")
    if job.cohort.sampled is not None:
        raise JobError(
            f"cohort.sampled={job.cohort.sampled} draws from all clients, and each of {replicas} replicas knows only "
            "its own",
            hint="run one server, or leave cohort.sampled out",
        )
    if job.exchanges_gradients:
        raise JobError(
            "aggregation.type=fedsgd is one step for all, and replicas step by themselves",
            hint="run one server, or set aggregation.type=fedavg",
        )
    if job.aggregation.robust:
        raise JobError(
            f"aggregation.type={job.aggregation.type} compares all clients' updates, and each of {replicas} replicas "
            "has only its own clients'",
            hint="run one server, or another aggregation.type (with max_update_norm)",
        )
    shared_trunk = job.cohort.adapters == "shared" and "trunk" in job.training.parts
    if job.aggregation.lora == "exact" and shared_trunk:
        raise JobError(
            "aggregation.lora=exact does not reach a shared trunk, whose factors replicas average one by one",
            hint="run one server, or set cohort.adapters=per_client or aggregation.lora=freeze_a",
        )
