"""What a private job would cost the rows' owner, held against what the ledger has and the policy allows."""

from pathlib import Path

from launcher.preflight.checks import Check, Checklist, warn
from shared.job import GaussianPrivacy, Job
from worker_client.client import ledger_of
from worker_client.policy import Policy
from worker_client.privacy.accounting import epsilon
from worker_client.privacy.ledger import Ledger, read_entries


def check_privacy(rows: Checklist, job: Job, data: Path, ledger: Path | None, policy: Policy) -> None:
    """One round can be paid for; a warning if not all of them can. Nothing for a job without privacy."""
    if not isinstance(job.privacy, GaussianPrivacy):
        return

    def look() -> Ledger:
        found = ledger_of(data, ledger, policy, job)
        assert found is not None
        found.check(job)
        return found

    found = rows.attempt("privacy", look, lambda kept: describe(job, kept), "see --privacy-ledger and --policy")
    if found is not None and (short := _too_many_rounds(job, found)) is not None:
        rows.add(short)


def describe(job: Job, ledger: Ledger) -> str:
    assert isinstance(job.privacy, GaussianPrivacy)
    cost = epsilon([(job.privacy.noise_multiplier, job.rounds.count)], job.privacy.delta)
    before = ledger.spent(job)
    return (
        f"{job.privacy.type}: all rounds cost epsilon {cost:.4g} at delta {job.privacy.delta:g}; all jobs before, "
        f"{before.total_epsilon:.4g} at {before.total_delta:g} ({ledger.path})"
    )


def _too_many_rounds(job: Job, ledger: Ledger) -> Check | None:
    assert isinstance(job.privacy, GaussianPrivacy)
    if ledger.max_epsilon is None or ledger.max_delta is None:
        return None
    left = job.rounds.count - ledger.spent(job).rounds
    paid = [(entry.noise_multiplier, entry.rounds) for entry in read_entries(ledger.path)]
    total = epsilon([*paid, (job.privacy.noise_multiplier, left)], ledger.max_delta)
    if total <= ledger.max_epsilon:
        return None
    return warn(
        "privacy of all rounds",
        f"with all of the job's rounds epsilon would be {total:.4g} at delta {ledger.max_delta:g}, more than "
        f"max_epsilon={ledger.max_epsilon:g}: this client would stop before the end",
        "ask the operator for more noise or fewer rounds, or for a cohort.quorum that can do without you",
    )
