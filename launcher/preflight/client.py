"""Before `flglm client train`: keys, invitation and broker, and, as far as the job is known, model, rows and room.

The job comes from the server, by a session that shakes hands and leaves without joining; or from a job file.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launcher.preflight.checks import Check, Checklist, fail, ok, warn
from launcher.preflight.files import (
    check_clock,
    check_invited_job,
    check_owner,
    check_updates,
    describe,
    identity_of,
    invitation_of,
    job_of,
)
from launcher.preflight.models import (
    check_digest,
    check_split,
    checkpoint_of,
    client_need,
    evaluation_traffic,
    round_traffic,
)
from launcher.preflight.network import Context, check_broker, check_name, probing
from launcher.preflight.privacy import check_privacy
from launcher.preflight.resources import check_checkpoints, check_disk, check_memory
from launcher.preflight.rows import check_parsed, check_rows
from launcher.report_data import bytes_text
from shared.errors import ConnectionFailed, DeadlineExceeded, FlglmError, HandshakeError, Refused
from shared.group_keys import group_key_for
from shared.identity import Identity
from shared.invitations import BrokerAt, Invitation
from shared.job import Job
from shared.model.checkpoint import Checkpoint
from shared.payload.messages import Welcome
from worker_client.client import agreed_job, check_same_model, finished_before
from worker_client.link import Link
from worker_client.policy import Policy, check_job, check_server, load_policy
from worker_client.progress import KEPT_CHECKPOINTS


@dataclass(frozen=True)
class ClientPlan:
    """What `flglm client train` would be told. `job`: a job file, for when the server is not there yet."""

    invite: Path
    key: Path
    data: Path
    out: Path
    validation: Path | None = None
    validation_fraction: float = 0.1
    model: str | None = None
    policy: Path | None = None
    privacy_ledger: Path | None = None
    group_key: Path | None = None
    job: Path | None = None
    digest: bool = False
    timeout_s: float = 5.0


def check_client_plan(plan: ClientPlan, rows: Checklist, now: datetime) -> None:
    identity = identity_of(rows, plan.key)
    invitation = invitation_of(rows, plan.invite, now)
    rows.add(check_clock(now, [plan.key, plan.invite, plan.data]))
    policy = _policy(plan, rows, invitation)
    file = None if plan.job is None else job_of(rows, plan.job)
    if file is not None and plan.job is not None and invitation is not None:
        rows.add(check_invited_job(file, plan.job, invitation))
    welcome = None
    if identity is None and invitation is not None:
        for broker in invitation.brokers:
            _name_resolves(broker, rows)
    if identity is not None and invitation is not None:
        if (owner := check_owner(identity, invitation)) is not None:
            rows.add(owner)
        welcome = _meet(plan, rows, identity, invitation, allowed=policy is not None)
    job = _agreed(rows, welcome, invitation) or file
    if job is None:
        _without_job(plan, rows)
    else:
        _with_job(plan, rows, job, policy, welcome, invitation)


def _policy(plan: ClientPlan, rows: Checklist, invitation: Invitation | None) -> Policy | None:
    """The site's policy, if it can be read and allows this server."""
    if plan.policy is None:
        return Policy()
    path = plan.policy

    def load() -> Policy:
        policy = load_policy(path)
        if invitation is not None:
            check_server(policy, invitation)
        return policy

    return rows.attempt("policy", load, lambda _: f"{path} allows this server", "mend it, or name it: --policy")


# Broker and server


def _meet(
    plan: ClientPlan, rows: Checklist, identity: Identity, invitation: Invitation, *, allowed: bool
) -> Welcome | None:
    """Rows of all brokers, and of the server behind the first that has it. None if it did not welcome us.

    A server that the policy does not allow is not greeted: not even the key is shown to it.
    """
    with probing() as context:
        doors = [broker for broker in invitation.brokers if _check_way(context, broker, plan, rows, identity)]
        if not doors or not allowed:
            return None
        last: Check | None = None
        for broker in doors:
            last, welcome = visit(context, broker, identity, invitation, plan)
            if welcome is not None:
                break
        assert last is not None
        rows.add(last)
        return welcome


def _name_resolves(broker: BrokerAt, rows: Checklist) -> bool:
    named = check_name(broker.address)
    if named is not None:
        rows.add(named)
    return named is None or named.status == "ok"


def _check_way(context: Context, broker: BrokerAt, plan: ClientPlan, rows: Checklist, identity: Identity) -> bool:
    if not _name_resolves(broker, rows):
        return False
    answer = check_broker(context, broker.door, identity.link, at="clients", timeout_s=plan.timeout_s)
    rows.add(answer)
    return answer.status == "ok"


def visit(
    context: Context, broker: BrokerAt, identity: Identity, invitation: Invitation, plan: ClientPlan
) -> tuple[Check, Welcome | None]:
    """Shake hands with the server and leave. It was no client that joined, and waits for it as before."""
    link = Link(
        broker.door,
        identity,
        invitation.server_public,
        invitation.job_digest,
        connect_timeout_s=plan.timeout_s,
        context=context,
    )
    mend = f"send {plan.key.with_suffix('.card')} to the operator, who types flglm admit"
    try:
        with link:
            welcome: Welcome = link.welcome.result().message
    except Refused as error:
        if error.reason == "job_differs":
            mend = "ask the operator for a new invitation: flglm invite --job, with the job that runs"
        return fail("server", error.message, error.hint or mend), None
    except HandshakeError as error:
        return fail("server", error.message, error.hint or "ask the operator for a new invitation"), None
    except (ConnectionFailed, DeadlineExceeded) as error:
        return warn("server", error.message, "ask the operator when it runs, then check again"), None
    except FlglmError as error:
        return fail("server", error.message, error.hint or "ask the server's operator"), None
    return ok("server", f"{invitation.server} is there and admits this key"), welcome


def _agreed(rows: Checklist, welcome: Welcome | None, invitation: Invitation | None) -> Job | None:
    if welcome is None or invitation is None:
        return None
    return rows.attempt(
        "job",
        lambda: agreed_job(welcome, invitation),
        lambda job: f"{describe(job)}, as invited",
        "ask the operator for a new invitation",
    )


# What needs the job


def _without_job(plan: ClientPlan, rows: Checklist) -> None:
    rows.add(
        warn(
            "job",
            "not known without the server's answer: policy, model, rows, memory and disk were not held against it",
            "check again when the server answers, or give --job a copy of the job file",
        )
    )
    if plan.model is not None:
        checkpoint_of(rows, plan.model, "--model")
    _parse_only(plan, rows)
    rows.add(check_disk("--out", plan.out, None))


def _parse_only(plan: ClientPlan, rows: Checklist) -> None:
    for path in (plan.data, plan.validation):
        if path is not None:
            rows.add(check_parsed(path))


def _with_job(
    plan: ClientPlan,
    rows: Checklist,
    job: Job,
    policy: Policy | None,
    welcome: Welcome | None,
    invitation: Invitation | None,
) -> None:
    rows.add(check_updates(job))
    if plan.group_key is not None or job.aggregation.group_key is not None:
        rows.attempt(
            "group key",
            lambda: group_key_for(job, plan.group_key),
            lambda _: f"{plan.group_key} is the job's: the server sees neither sums nor averages",
            "see --group-key",
        )
    if plan.policy is not None and policy is not None:
        rows.attempt("policy and job", lambda: check_job(policy, job), lambda _: "the policy allows it", "see --policy")
    check_privacy(rows, job, plan.data, plan.privacy_ledger, policy or Policy())
    if invitation is not None and finished_before(plan.out, invitation) is not None:
        rows.add(warn("result", f"{plan.out} holds this job's result: nothing would be trained", "give another --out"))
    if (before := check_checkpoints("--out", plan.out, job.digest().hex())) is not None:
        rows.add(before)
    checkpoint = checkpoint_of(rows, plan.model or job.model_name_or_path, "--model", job.drawn_from)
    needed = None
    if checkpoint is not None:
        needed = _with_model(plan, rows, job, checkpoint, welcome)
    else:
        _parse_only(plan, rows)
    rows.add(check_disk("--out", plan.out, needed))


def _with_model(
    plan: ClientPlan, rows: Checklist, job: Job, checkpoint: Checkpoint, welcome: Welcome | None
) -> int | None:
    """Rows of the model and of what is read with its tokenizer; the bytes that checkpoints need, if that is known."""
    if welcome is not None:
        rows.attempt(
            "same model",
            lambda: check_same_model(checkpoint, welcome),
            lambda _: "configuration, tensors and first bytes are the server's",
            "name this site's copy of the server's model with --model",
        )
    if plan.digest:
        rows.add(check_digest(checkpoint))
    checks, held_out = check_rows(plan.data, plan.validation, plan.validation_fraction, job, checkpoint)
    for row in checks:
        rows.add(row)
    check, split = check_split(checkpoint, job)
    rows.add(check)
    if split is None:
        return None
    try:
        need = client_need(checkpoint, job, split, KEPT_CHECKPOINTS + 2)  # the first, and the one being written
        up, down = round_traffic(checkpoint, job, split)
    except FlglmError as error:
        rows.add(fail("method", error.message, error.hint or "ask the operator for a job that fits the model"))
        return None
    rows.add(check_memory(need.memory))
    scored = evaluation_traffic(checkpoint, job, held_out)
    rows.add(
        ok("traffic", f"{bytes_text(up)} up and {bytes_text(down)} down a round, at most{_evaluations(job, scored)}")
    )
    return need.disk


def _evaluations(job: Job, scored: int) -> str:
    every = job.rounds.evaluate_every
    rounds = "round" if every == 1 else f"{every} rounds"
    return f"; {bytes_text(scored)} each way for an evaluation, every {rounds}" if scored else ""
