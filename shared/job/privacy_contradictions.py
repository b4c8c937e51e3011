"""What privacy of updates does not go with: it would promise what it cannot keep."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shared.job.privacy import CentralPrivacy, GaussianPrivacy, LocalPrivacy
from shared.job.secure import CLIP

if TYPE_CHECKING:
    from shared.job.job import Job

# No noise goes farther (shared/model/gaussian.py).
STANDARD_DEVIATIONS = 9


def privacy(job: "Job") -> Iterator[str]:
    if not isinstance(job.privacy, GaussianPrivacy):
        return
    name, aggregation = f"privacy.type={job.privacy.type}", job.aggregation
    if job.rounds.weighting != "clients":
        yield (
            f"{name} needs rounds.weighting=clients: by {job.rounds.weighting}, one client's share of a mean has no "
            "bound, and tells how much it has"
        )
    if aggregation.max_update_norm is not None:
        yield f"privacy.clip_norm bounds updates already: {name} needs aggregation.max_update_norm=null"
    if aggregation.type == "scaffold":
        yield f"{name} clips updates, and aggregation.type=scaffold reads mean gradients off updates that are whole"
    if aggregation.lora == "exact":
        yield f"aggregation.lora=exact adds products of the clients' factors, which the noise of {name} does not cover"
    if job.wire.compresses_updates:
        yield (
            f"{name} clips a round's update, and wire.update={job.wire.update}, wire.update_density="
            f"{job.wire.update_density:g} add what was left of others to it: set float32 and 1.0"
        )
    if isinstance(job.privacy, CentralPrivacy) and aggregation.robust:
        yield (
            f"{name} adds noise for what one client changes in a mean; in aggregation.type={aggregation.type} it may "
            "change more: set another one, or privacy.type=local"
        )
    std = job.privacy.noise_multiplier * job.privacy.clip_norm
    if isinstance(job.privacy, LocalPrivacy) and job.secure != "off" and STANDARD_DEVIATIONS * std > CLIP:
        yield (
            f"{name} adds noise of standard deviation {std:g}, and aggregation.secure={job.secure} clips values to "
            f"{CLIP:g}: lower privacy.clip_norm, so that the mean is not shifted"
        )
    yield from _trunk(job, name)


def _trunk(job: "Job", name: str) -> Iterator[str]:
    """Whatever the server trains, it trains by raw gradients, at every step."""
    if "trunk" not in job.training.parts or "trunk" in job.client_parts:
        return
    if job.cohort.adapters == "shared":
        yield (
            f"{name} covers updates, and a trunk that all train at once learns from raw gradients: leave trunk out of "
            "training.parts, or set split.trunk=client, or cohort.adapters=per_client with privacy.type=central"
        )
    elif isinstance(job.privacy, LocalPrivacy):
        yield (
            f"{name} is noise that clients add, and cohort.adapters=per_client are adapters that the server holds: "
            "leave trunk out of training.parts, or set privacy.type=central"
        )
    elif job.secure != "off":
        yield (
            f"{name} with cohort.adapters=per_client bounds what a client changed here and there as one, and "
            f"aggregation.secure={job.secure} hides the one from the server: set aggregation.secure=off, or leave "
            "trunk out of training.parts"
        )
