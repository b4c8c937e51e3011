"""Which jobs several servers may train together."""

from typing import Any

import pytest

from shared.errors import JobError
from shared.job import Job, parse_job
from shared.job.replicas import check_replicas


def job_of(**sections: Any) -> Job:
    cohort = {"clients": 6} | sections.pop("cohort", {})
    return parse_job({"model_name_or_path": "m", "cohort": cohort, **sections}, "job")


OFF = {"secure": "off"}


@pytest.mark.parametrize(
    ("job", "replicas", "said"),
    [
        (job_of(), 2, "the job says cohort.replicas=1"),
        (job_of(cohort={"replicas": 2}), 1, "1 replicas, and the job says cohort.replicas=2"),
        (job_of(aggregation=OFF), 7, "7 replicas for 6 clients"),
        (job_of(aggregation=OFF, cohort={"sampled": 3}), 2, "cohort.sampled=3 draws from all clients"),
        (job_of(aggregation={"type": "fedsgd"} | OFF, rounds={"local_steps": 1}), 2, "fedsgd is one step for all"),
        (
            job_of(aggregation={"type": "median"} | OFF, training={"parts": ["head", "tail"]}),
            2,
            "has only its own clients'",
        ),
        (job_of(aggregation={"lora": "exact"} | OFF), 2, "does not reach a shared trunk"),
    ],
)
def test_what_several_servers_cannot_do_is_refused_by_name(job: Job, replicas: int, said: str) -> None:
    with pytest.raises(JobError) as refused:
        check_replicas(job, replicas)
    assert said in refused.value.message


@pytest.mark.parametrize(
    ("job", "replicas"),
    [(job_of(), 1), (job_of(cohort={"replicas": 2}), 2), (job_of(aggregation=OFF), 3), (job_of(aggregation=OFF), 1)],
)
def test_others_may(job: Job, replicas: int) -> None:
    check_replicas(job, replicas)
