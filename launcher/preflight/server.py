"""Before `flglm server`: its key, its job, its model, its brokers, and room for all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from launcher.people import brokers_at
from launcher.preflight.checks import Check, Checklist, fail, ok
from launcher.preflight.files import (
    check_cards,
    check_clock,
    check_invite_for_server,
    check_updates,
    identity_of,
    job_of,
)
from launcher.preflight.models import check_digest, check_split, checkpoint_of, server_need
from launcher.preflight.network import Context, check_broker, check_metrics, check_name, probing
from launcher.preflight.resources import Need, check_checkpoints, check_disk, check_memory
from shared.errors import JobError
from shared.identity import Identity
from shared.job import Job
from shared.job.replicas import check_replicas
from shared.wire.curve import Door
from worker_server.progress import KEPT_CHECKPOINTS


@dataclass(frozen=True)
class ServerPlan:
    """What `flglm server` would be told; `invites`, if given, are held against it; `digest`: read all weights."""

    job: Path
    key: Path
    clients: Path
    brokers: Sequence[str]
    broker_cards: Sequence[Path]
    plain: bool
    state: Path
    device: str
    replica: int = 0
    replicas: int = 1
    invites: Sequence[Path] = ()
    digest: bool = False
    metrics: str | None = None
    timeout_s: float = 5.0


def check_server_plan(plan: ServerPlan, rows: Checklist, now: datetime) -> None:
    identity, job = identity_of(rows, plan.key), job_of(rows, plan.job)
    rows.add(check_cards("clients", plan.clients, 1 if job is None else job.cohort.clients))
    rows.add(check_clock(now, [plan.key, plan.job, plan.clients, *plan.invites]))
    if job is not None:
        rows.add(check_updates(job))
        if plan.replicas > 1 or job.cohort.replicas > 1:
            rows.attempt(
                "replicas",
                lambda: check_replicas(job, plan.replicas),
                lambda _: f"{plan.replicas} servers may train this job together",
                "run one server",
            )
    if job is not None and identity is not None:
        for path in plan.invites:
            rows.add(check_invite_for_server(path, job, identity, now))
    _check_brokers(plan, rows, identity)
    if plan.metrics is not None:
        rows.add(check_metrics(plan.metrics))
    device = check_device(plan.device)
    rows.add(device)
    if job is not None:
        _check_model(plan, rows, job, device)


def _check_brokers(plan: ServerPlan, rows: Checklist, identity: Identity | None) -> None:
    doors = rows.attempt(
        "broker cards",
        lambda: [at.door for at in brokers_at(list(plan.brokers), list(plan.broker_cards), plan.plain)],
        lambda found: f"{len(found)} brokers" if len(found) > 1 else found[0].address,
        "ask the broker's operator for its card, and name it with --broker-card",
    )
    if doors is None:
        return
    with probing() as context:
        for door in doors:
            named = check_name(door.address)
            if named is not None:
                rows.add(named)
            if identity is not None and not (named and named.status == "fail"):
                rows.add(_broker(context, door, identity, plan))


def _broker(context: Context, door: Door, identity: Identity, plan: ServerPlan) -> Check:
    return check_broker(context, door, identity.link, at="servers", timeout_s=plan.timeout_s)


def _check_model(plan: ServerPlan, rows: Checklist, job: Job, device: Check) -> None:
    folder = plan.state if plan.replicas == 1 else plan.state / f"replica-{plan.replica}"
    if (before := check_checkpoints("--state", folder, job.digest().hex())) is not None:
        rows.add(before)
    need = _need(plan, rows, job)
    rows.add(check_disk("--state", folder, None if need is None else need.disk))
    if need is None:
        return
    if plan.device.startswith("cuda") and device.status == "ok":
        rows.add(check_memory(need.memory, lambda: torch.cuda.mem_get_info(torch.device(plan.device))[0], "gpu memory"))
    else:
        rows.add(check_memory(need.memory))


def _need(plan: ServerPlan, rows: Checklist, job: Job) -> Need | None:
    checkpoint = checkpoint_of(rows, job.model_name_or_path, "model_name_or_path in the job file", job.drawn_from)
    if checkpoint is None:
        return None
    if plan.digest:
        rows.add(check_digest(checkpoint))
    check, split = check_split(checkpoint, job)
    rows.add(check)
    if split is None:
        return None
    try:
        return server_need(checkpoint, job, split, KEPT_CHECKPOINTS + 1)  # and the one that is being written
    except JobError as error:
        rows.add(fail("method", error.message, error.hint or "mend method.target_modules in the job file"))
        return None


def check_device(device: str) -> Check:
    """The device exists, and takes a tensor."""
    mend = "give --device cpu, or one that nvidia-smi lists; torch must be built for it"
    try:
        wanted = torch.device(device)
        if wanted.type == "cuda" and not torch.cuda.is_available():
            return fail("device", f"{device}: torch sees no usable GPU", mend)
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return fail("device", f"{device}: {str(error).splitlines()[0][:200]}", mend)
    name = torch.cuda.get_device_name(wanted) if wanted.type == "cuda" else f"{torch.get_num_threads()} threads"
    return ok("device", f"{device}, {name}")
