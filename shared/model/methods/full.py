"""All weights are trained, each part's where it lies."""

from shared.job import Job
from shared.model.carve import Part


def add(part: Part, job: Job) -> None:
    part.module.requires_grad_(True)
