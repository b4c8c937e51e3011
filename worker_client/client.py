"""A data owner's run from an invitation to a trained head and tail on disk."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import zmq
from safetensors.torch import save_file
from transformers import AutoTokenizer

from shared import state_files
from shared.errors import ConnectionFailed, HandshakeError, ModelError, Refused
from shared.group_keys import group_key_for
from shared.identity import Identity
from shared.invitations import Invitation
from shared.job import Job, parse_job
from shared.job.secure import seen_of, why_off
from shared.model.checkpoint import Checkpoint, Fingerprint, checkpoint_of
from shared.model.families import context_length
from shared.model.methods import longest_row
from shared.model.plan import SplitPlan
from shared.model.trainable import initial_values
from shared.payload.messages import RESIDUAL, Welcome
from shared.secure_aggregation.group_key import GroupKey
from worker_client.data import LoadedRows, Row, load_rows, split_validation
from worker_client.group import Group
from worker_client.head_tail import NO_SCORE, HeadTail, Score, load_client_parts
from worker_client.link import Link
from worker_client.local_trunk import trunk_of
from worker_client.masking import Roster
from worker_client.policy import Policy, check_job, check_server
from worker_client.privacy.ledger import Ledger, Spent, digest_of, path_of
from worker_client.privacy.protection import Protection
from worker_client.steps import Report
from worker_client.training import Training
from worker_client.way import Way

# A cohort waits for its slowest member until the job's deadline (in plain FedAvg that of all local steps); the answer
# itself takes a little longer.
GRACE_S = 60.0
WAIT_FOR_ROUND_S = 3600.0
ACCEPT_ALL = Policy()
RESULT = "flglm.json"
TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class ClientSettings:
    """What the data owner says; everything else comes with the job.

    `model`: this site's copy of the model, if it is not where the job says. `validation_fraction` of the rows are held
    out unless `validation` names a file of its own. `policy`: what this site accepts. `reconnect_s`: how long to try to
    get back when a connection broke. `privacy_ledger`: where what jobs spend is kept, by default beside the rows; a
    folder has one for each file of rows. `group_key`: the file of the data owners' common key, which a job with
    aggregation.group_key needs. `wait_s`: how long to wait for the other members, for a round to begin or to end; None
    for an hour, or cohort.deadline_s where that is longer, and a minute.
    """

    data: Path
    out: Path
    validation: Path | None = None
    validation_fraction: float = 0.1
    model: str | None = None
    threads: int | None = None
    connect_timeout_s: float = 30.0
    reconnect_s: float = 600.0
    policy: Policy = ACCEPT_ALL
    privacy_ledger: Path | None = None
    group_key: Path | None = None
    wait_s: float | None = None


@dataclass(frozen=True)
class Result:
    """The joint model's score on this client's validation rows; body bytes sent and received; what a private job cost
    of the rows' privacy.
    """

    score: Score | None
    bytes_up: int
    bytes_down: int
    privacy: Spent | None = None


def run_client(
    settings: ClientSettings,
    invitation: Invitation,
    identity: Identity,
    report: Report,
    context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
) -> Result:
    """Connect, check the job, load data and parts, train to the end, write the result to `settings.out`.

    Raises UsageError (data, model, checkpoint), Refused, ConnectionFailed, HandshakeError, DeadlineExceeded, PeerError.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    check_server(settings.policy, invitation)
    if (score := finished_before(settings.out, invitation)) is not None:
        report({"event": "finished_before", "out": str(settings.out)})
        return Result(score if score.tokens else None, 0, 0)
    way = Way(invitation, identity, settings.connect_timeout_s, settings.reconnect_s, context)
    site: Site | None = None

    def heard(event: dict[str, Any]) -> None:
        way.progress()
        report(event)

    while True:
        try:
            with way.link() as link:
                site = site or _prepare(settings, invitation, link, report)
                score = site.train(link, settings.out, heard, settings.wait_s)
                privacy = None if site.ledger is None else site.ledger.spent(site.job)
                _write_result(settings.out, site.job, site.parts, score, privacy)
                break
        except ConnectionFailed as error:
            way.broke(error, once_there=site is not None)
    return Result(score, way.bytes_up, way.bytes_down, privacy)


@dataclass(frozen=True)
class Site:
    """What a client trains: the agreed job, its parts of the model, its rows; who may be in masked sums with it."""

    job: Job
    parts: HeadTail
    rows: tuple[Row, ...]
    validation: tuple[Row, ...]
    roster: Roster | None = None
    ledger: Ledger | None = None
    group: Group | None = None

    def train(self, link: Link, out: Path, report: Report, wait_s: float | None) -> Score | None:
        """Through one link, from the newest checkpoint in `out` to the end of the job; `wait_s`: see ClientSettings."""
        steps = self.job.rounds.local_steps if self.job.split.trunk == "client" else 1
        timeout_s = max(self.job.cohort.deadline_s * steps, WAIT_FOR_ROUND_S) + GRACE_S
        trunk = trunk_of(link, self.job, self.parts, timeout_s, wait_s)
        protection = None if self.ledger is None else Protection(self.job, self.ledger, report)
        return Training(
            self.job, self.parts, trunk, self.rows, self.validation, out, report, self.roster, protection, self.group
        ).run()


def _prepare(settings: ClientSettings, invitation: Invitation, link: Link, report: Report) -> Site:
    """Agree on job, group and model, then read the rows."""
    job, checkpoint = agree(link, invitation, settings.policy, settings.model)
    key = group_key_for(job, settings.group_key)
    rows, validation, loaded = _rows(settings, job, checkpoint)
    report(
        {
            "event": "data",
            "rows": len(rows),
            "validation_rows": len(validation),
            "truncated": loaded.truncated,
            "skipped_long": loaded.skipped_long,
            "without_target": loaded.without_target,
            "total_steps": job.total_steps,
        }
    )
    updates = {"handed_in": bool(job.handed_in), "secure": job.secure, "seen": seen_of(job), "why_off": why_off(job)}
    report({"event": "updates"} | updates)
    return Site(
        job,
        load_client_parts(checkpoint, job),
        rows,
        validation,
        settings.policy.names(),
        ledger_of(settings.data, settings.privacy_ledger, settings.policy, job),
        group_of(job, checkpoint, key),
    )


def group_of(job: Job, checkpoint: Checkpoint, key: GroupKey | None) -> Group | None:
    """What a client needs under a group's key; None without one."""
    if key is None:
        return None
    plan = SplitPlan(job.split.head_blocks, job.split.tail_blocks, checkpoint.config.num_hidden_layers)
    return Group(job, key, lambda: initial_values(checkpoint, plan, job))


def ledger_of(data: Path, ledger: Path | None, policy: Policy, job: Job) -> Ledger | None:
    """What a private job on the rows of `data` is paid from; None for any other. Raises DataError."""
    if job.privacy.type == "none":
        return None
    return Ledger(path_of(data, ledger), digest_of(data), policy.max_epsilon, policy.max_delta)


def agree(link: Link, invitation: Invitation, policy: Policy, model: str | None) -> tuple[Job, Checkpoint]:
    """The invited job, if the policy allows it, and this site's copy of the server's model.

    Raises HandshakeError, JobError, Refused, ModelError.
    """
    welcome = link.welcome.result().message
    job = agreed_job(welcome, invitation)
    check_job(policy, job)
    checkpoint = checkpoint_of(job, model)
    check_same_model(checkpoint, welcome)
    return job, checkpoint


def agreed_job(welcome: Welcome, invitation: Invitation) -> Job:
    """The server's job, if it is the one that the invitation names. Raises HandshakeError, JobError."""
    if hashlib.sha256(welcome.job.encode()).digest() != invitation.job_digest:
        raise HandshakeError("the server sent another job than the invitation names")
    return parse_job(json.loads(welcome.job), "the server's job")


def check_same_model(checkpoint: Checkpoint, welcome: Welcome) -> None:
    """Raises Refused if the client's checkpoint is not the one that the server's trunk was cut from."""
    theirs = Fingerprint(welcome.config, welcome.tensor_table, welcome.weights)
    difference = checkpoint.fingerprint().difference(theirs)
    if difference:
        raise Refused(
            f"the model at {checkpoint.name_or_path} is not the server's: {difference}",
            reason="model_differs",
            hint="name this site's copy of the server's model with --model",
        )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ModelError(f"{checkpoint.name_or_path}: no tokenizer ({reason})") from None


def _rows(
    settings: ClientSettings, job: Job, checkpoint: Checkpoint
) -> tuple[tuple[Row, ...], tuple[Row, ...], LoadedRows]:
    tokenizer = load_tokenizer(checkpoint)
    limit = longest_row(job, context_length(checkpoint.config))

    def load(path: Path) -> LoadedRows:
        return load_rows(path, tokenizer, max_length=limit, too_long=job.data.too_long)

    loaded = load(settings.data)
    if settings.validation is not None:
        return loaded.rows, load(settings.validation).rows, loaded
    if settings.validation_fraction == 0:
        return loaded.rows, (), loaded
    train, held_out = split_validation(loaded.rows, settings.validation_fraction, job.training.seed)
    return train, held_out, loaded


def finished_before(out: Path, invitation: Invitation) -> Score | None:
    """The score in `out`, if a run of this very job came to its end there. What `_write_result` writes last counts."""
    try:
        document = json.loads((out / RESULT).read_text())
        if document["job_digest"] != invitation.job:
            return None
        return NO_SCORE if document["score"] is None else Score(**document["score"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_result(out: Path, job: Job, parts: HeadTail, score: Score | None, privacy: Spent | None = None) -> None:
    """`trained.safetensors`: what was trained in head and tail, by name in the whole model, and what was added to
    frozen weights, (out, in), as `residual/<module>.weight`; `flglm.json`: the job, and what it cost of privacy.

    Raises CheckpointError if the disk refuses.
    """
    tensors = {name: parameter.detach().contiguous() for name, parameter in parts.parameters.items()}
    tensors |= {f"{RESIDUAL}{module}.weight": value.contiguous() for module, value in parts.residuals.added.items()}
    document = {
        "job": job.model_dump(mode="json"),
        "job_digest": job.digest().hex(),
        "score": None if score is None else vars(score),
        **({} if privacy is None else {"privacy": asdict(privacy)}),
    }
    draft = out / f".{RESULT}.draft"
    with state_files.writing(out):
        save_file(tensors, out / TRAINED)
        draft.write_text(json.dumps(document, indent=2) + "\n")
        draft.replace(out / RESULT)
