"""A round's updates as one masked sum: its terms, and what is summed. The same at clients and server.

What is summed is the difference to the values that the round began with, float32, as one vector (flat.py): differences
are small, and so is what rounding them costs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from shared import flat
from shared.errors import JobError, SchemaError
from shared.flat import Shapes
from shared.job import Job
from shared.job.secure import CLIP, neighbourhood, server_quorum
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.terms import MAX_LENGTH, MAX_WEIGHT, Member, RingTerms, Terms

LARGEST_ERROR = 1e-7
"""Of a value of the mean, where 64-bit words give that much; they do for a million target tokens of 512 clients."""


def check_length(shapes: Shapes) -> None:
    """Raises JobError if a sum cannot be so long."""
    if (length := flat.length(shapes)) > MAX_LENGTH:
        raise JobError(
            f"{length} trained values in head and tail; a masked update has {MAX_LENGTH} at most",
            hint="train fewer (method.type=lora), or set aggregation.secure=off: the server sees every client's update",
        )


def most_tokens(job: Job) -> int:
    """How many target tokens one client can have trained on in a round."""
    training = job.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * job.rounds.local_steps
    return rows * job.data.max_length


def terms_of(job: Job, shapes: Shapes, members: Sequence[Member], round: int, nonce: str) -> Terms:
    """Of the sum of `round`, tried under `nonce` (32 bytes in hexadecimal). Raises SchemaError for members that no sum
    can have: too few, twice the same, or not in the order of their names.
    """
    label = hashlib.sha256(b"flglm round\0" + job.digest() + round.to_bytes(8) + bytes.fromhex(nonce)).hexdigest()
    neighbours, threshold = neighbourhood(job, max(2, len(members)))
    try:
        return Terms(label=label, neighbours=neighbours, threshold=threshold, **_of_any_sum(job, shapes, members))
    except ValidationError as error:
        raise _no_sum(members, error) from None


def ring_terms_of(job: Job, shapes: Shapes, members: Sequence[Member], nonce: str) -> RingTerms:
    """Of all sums of the ring that was made under `nonce`. Raises SchemaError as `terms_of`."""
    label = hashlib.sha256(b"flglm ring\0" + job.digest() + bytes.fromhex(nonce)).hexdigest()
    try:
        return RingTerms(label=label, minimum=server_quorum(job), **_of_any_sum(job, shapes, members))
    except ValidationError as error:
        raise _no_sum(members, error) from None


def _of_any_sum(job: Job, shapes: Shapes, members: Sequence[Member]) -> dict[str, Any]:
    group = job.aggregation.group_key is not None
    shift = (len(members) - 1).bit_length() if group else 0
    weight = {"tokens": min(MAX_WEIGHT, most_tokens(job)), "rows": MAX_WEIGHT, "clients": 1}[job.rounds.weighting]
    return {
        "members": tuple(members),
        "length": flat.length(shapes),
        "clip": CLIP,
        "max_weight": weight,
        # What 64-bit words always give, if every weight were the smallest.
        "largest_error": max(LARGEST_ERROR, len(members) * weight * CLIP * 2.0 ** (shift - 62)),
        "group_key": group,
    }


def _no_sum(members: Sequence[Member], error: ValidationError) -> SchemaError:
    return SchemaError(f"no masked sum among these {len(members)} members ({error.errors()[0]['msg']})")


def flat_difference(start: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Floats:
    """`values` less `start`, float32 (length,)."""
    vector: Floats = flat.join({name: values[name].detach().float() - start[name].float() for name in start}).numpy()
    return vector
