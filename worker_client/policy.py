"""What a data owner accepts, in a file of its own. A job that asks for more is refused before any data is read."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.allow_list import AllowList
from shared.errors import Refused
from shared.identity import key_digest
from shared.invitations import Invitation
from shared.job import GaussianPrivacy, Job, MethodName, Privacy
from shared.job.privacy import Delta
from shared.job.secure import why_off
from shared.key_files import Hex32
from shared.yaml_files import read_mapping, validated

Blocks = Annotated[int, Field(ge=1, le=1000)]
Count = Annotated[int, Field(ge=1)]


class Policy(BaseModel):
    """Nothing is limited that is not named.

    `secure_updates`: only jobs whose updates of head and tail are masked, if they train any. `roster`: a folder of the
    cards of all clients of the job (relative to the policy file): a masked sum that the server would make among
    others is refused. `max_rows`: over the whole job, a row that is trained on again counted again. `servers`: public
    keys, or their SHA-256, in hexadecimal. `least_noise`: a job's privacy.noise_multiplier; more than 0 refuses jobs
    without privacy. `max_epsilon` at `max_delta`: what all jobs together may spend of the rows' privacy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_head_blocks: Blocks = 1
    min_tail_blocks: Blocks = 1
    methods: tuple[MethodName, ...] | None = None
    servers: tuple[Hex32, ...] | None = None
    max_rows: Count | None = None
    max_rounds: Count | None = None
    least_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_delta: Delta | None = None
    share_updates: bool = True
    """False: no update leaves, so jobs may train the trunk, and of head and tail what is personal."""
    secure_updates: bool = False
    roster: Path | None = None

    def names(self) -> Callable[[], Mapping[bytes, str]] | None:
        """The roster as it is when asked for: names by public key. Asking raises KeyFileError."""
        return None if self.roster is None else AllowList(self.roster).names

    @model_validator(mode="after")
    def _epsilon_at_a_delta(self) -> "Policy":
        if self.max_epsilon is not None and self.max_delta is None:
            raise ValueError("max_epsilon is an epsilon at some delta: it needs max_delta")
        return self


def load_policy(path: Path) -> Policy:
    """Raises JobError; KeyFileError for a roster that cannot be read."""
    policy = validated(read_mapping(path, "policy file"), Policy, str(path))
    if policy.roster is None:
        return policy
    policy = policy.model_copy(update={"roster": path.parent / policy.roster})
    if names := policy.names():
        names()
    return policy


def check_server(policy: Policy, invitation: Invitation) -> None:
    """Before connecting. Raises Refused (`policy`)."""
    keys = (invitation.server_public_key, key_digest(invitation.server_public).hex())
    if policy.servers is not None and not set(keys) & set(policy.servers):
        raise _refused(f"its server {invitation.server} ({keys[0][:16]}...) is not among the policy's servers")


def check_job(policy: Policy, job: Job) -> None:
    """Before anything is read. Raises Refused (`policy`), naming the setting of the job."""
    rows = job.total_steps * job.training.per_device_train_batch_size * job.training.gradient_accumulation_steps
    held = " or ".join(job.handed_in)
    limits = (
        (job.split.head_blocks < policy.min_head_blocks, f"split.head_blocks={job.split.head_blocks} is less than "
         f"min_head_blocks={policy.min_head_blocks}"),
        (job.split.tail_blocks < policy.min_tail_blocks, f"split.tail_blocks={job.split.tail_blocks} is less than "
         f"min_tail_blocks={policy.min_tail_blocks}"),
        (policy.methods is not None and job.method.type not in policy.methods,
         f"method.type={job.method.type} is not among methods={list(policy.methods or ())}"),
        (policy.max_rounds is not None and job.rounds.count > policy.max_rounds,
         f"rounds.count={job.rounds.count} is more than max_rounds={policy.max_rounds}"),
        (policy.max_rows is not None and rows > policy.max_rows,
         f"it trains on {rows} rows (rounds.count x rounds.local_steps x batch), more than max_rows={policy.max_rows}"),
        *_privacy_limits(policy, job.privacy),
        (policy.secure_updates and bool(job.handed_in) and job.secure == "off",
         f"its updates are not masked, and secure_updates is true: {why_off(job)}"),
        (not policy.share_updates and bool(job.handed_in),
         f"training.parts={list(job.training.parts)} hands out updates of {held}, and share_updates is false"),
    )  # fmt: skip
    for exceeded, reason in limits:
        if exceeded:
            raise _refused(reason)


def _privacy_limits(policy: Policy, privacy: Privacy) -> Iterator[tuple[bool, str]]:
    if not isinstance(privacy, GaussianPrivacy):
        yield policy.least_noise > 0, f"it adds no noise, and least_noise={policy.least_noise:g}"
        yield policy.max_delta is not None, "it adds no noise: nothing bounds its epsilon, and max_delta is set"
        return
    multiplier, delta = privacy.noise_multiplier, privacy.delta
    yield (
        multiplier < policy.least_noise,
        f"privacy.noise_multiplier={multiplier:g} is less than least_noise={policy.least_noise:g}",
    )
    yield (
        policy.max_delta is not None and delta > policy.max_delta,
        f"privacy.delta={delta:g} is more than max_delta={policy.max_delta or 0:g}",
    )


def _refused(reason: str) -> Refused:
    return Refused(
        f"the policy of this site refuses the job: {reason}",
        reason="policy",
        hint="ask the operator for another job, or change the policy file if you agree",
    )
