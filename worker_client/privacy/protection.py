"""One client's updates in a private job: each is paid for in the ledger, once, before it leaves.

An update that was made is kept with the checkpoint that follows it. Where the same round is asked for again (a server
was killed, a member was lost) the very same update leaves again, which tells nobody more, and costs nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from shared.errors import LedgerError
from shared.job import CentralPrivacy, GaussianPrivacy, Job
from worker_client.privacy.accounting import epsilon
from worker_client.privacy.ledger import Ledger
from worker_client.privacy.updates import moved, protected
from worker_client.steps import Report

COVERED = "this client's whole updates, against {whom}"
NOT_COVERED = "hidden states and gradients that go to the server; how many rows and tokens there are"


@dataclass
class Protection:
    """`kept`: the difference that was handed in for the round at hand before, float32 by name, if it was."""

    job: Job
    ledger: Ledger
    report: Report
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def settings(self) -> GaussianPrivacy:
        assert isinstance(self.job.privacy, GaussianPrivacy)
        return self.job.privacy

    def resume(self, completed: int) -> None:
        """The client is about to join, after so many rounds of its own. Raises LedgerError, Refused."""
        spent = self.ledger.spent(self.job)
        if completed and not spent.rounds:
            raise LedgerError(
                f"{self.ledger.path}: knows nothing of this job, of which {completed} rounds were handed in",
                hint="name the ledger that they were paid from: --privacy-ledger FILE",
            )
        central = isinstance(self.settings, CentralPrivacy)
        self.report(
            {
                "event": "privacy",
                **self.settings.model_dump(),
                "epsilon_of_all_rounds": epsilon(
                    [(self.settings.noise_multiplier, self.job.rounds.count)], self.settings.delta
                ),
                "spent_before": asdict(spent),
                "ledger": str(self.ledger.path),
                "covers": COVERED.format(whom="all but the server" if central else "everybody"),
                "does_not_cover": NOT_COVERED,
            }
        )
        if not completed:
            self.ledger.check(self.job)

    def so_far(self) -> dict[str, Any]:
        """Epsilon and delta that this job has cost up to now."""
        spent = self.ledger.spent(self.job)
        return {"epsilon": spent.epsilon, "delta": spent.delta}

    def begin(self, kept: Mapping[str, Tensor]) -> None:
        """A round begins, for which this was handed in before, if it was.

        Raises Refused (`privacy_budget`) if it cannot be paid for.
        """
        self.kept = kept
        if not kept:
            self.ledger.check(self.job)

    def hand_in(self, round: int, start: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What may leave of `values`, which the round ended with, where it began with `start`. Paid for.

        Raises Refused, LedgerError.
        """
        if self.kept:
            self.report({"event": "update_repeated", "round": round})
        else:
            spent = self.ledger.charge(self.job)
            self.kept = protected(self.settings, start, values)
            self.report({"event": "privacy_spent", "round": round, **asdict(spent)})
        return moved(start, self.kept)
