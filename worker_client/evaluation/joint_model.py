"""The joint model through a session: head and tail here, the trunk, with what is trained in it, at the running server.

The session evaluates and generates, and does not join: rounds neither wait for it nor hear of it. Texts, labels and
scores stay here; hidden states go to the server as in training, without the number of tokens that count.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zmq
from torch import Tensor

from shared.identity import Identity
from shared.invitations import Invitation
from shared.model.families import context_length
from shared.model.methods import longest_row
from worker_client.batches import Batch, with_virtual_tokens
from worker_client.client import ACCEPT_ALL, GRACE_S, agree, load_tokenizer
from worker_client.evaluation.client_state import newest_in
from worker_client.generation import generate
from worker_client.head_tail import HeadTail, load_client_parts
from worker_client.local_trunk import trunk_of
from worker_client.policy import Policy, check_server
from worker_client.remote_trunk import RemoteTrunk
from worker_client.way import Way


@dataclass(frozen=True)
class SessionSettings:
    """`out`: where this client trained. `model`: this site's copy, if it is not where the job says."""

    out: Path
    model: str | None = None
    connect_timeout_s: float = 30.0
    policy: Policy = ACCEPT_ALL


@dataclass(frozen=True)
class JointModel:
    """`source`: where head and tail come from. `context`: as in training, so that the server takes every row."""

    parts: HeadTail
    trunk: RemoteTrunk
    tokenizer: Any
    context: int
    source: Path

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Raises what a session raises: ConnectionFailed, DeadlineExceeded, Refused."""
        batch = with_virtual_tokens(batch, self.trunk.job.prompt_tokens)
        hidden = self.parts.hidden(batch)
        outputs = []
        first = 0
        for lengths in _pieces(batch.lengths, self.trunk.job.cohort.max_batch_tokens):
            piece = hidden[first : first + sum(lengths)]
            first += len(piece)
            outputs.append(self.trunk.evaluate(piece, _without_targets(lengths)))
        return self.parts.tail.logits(torch.cat(outputs), batch.lengths, batch.at).float()

    def continued(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        end = self.tokenizer.eos_token_id
        (made,) = generate(self.parts, self.trunk, [prompt], max_new_tokens=max_new_tokens, eos_token_id=end)
        return made[:-1] if made[-1] == end else made


@contextmanager
def joint_model(
    settings: SessionSettings,
    invitation: Invitation,
    identity: Identity,
    context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
) -> Iterator[JointModel]:
    """For as long as the session is open.

    Raises CheckpointError before anybody is asked; ConnectionFailed, HandshakeError, Refused, ModelError, JobError.
    """
    check_server(settings.policy, invitation)
    state = newest_in(settings.out, invitation.job)
    way = Way(invitation, identity, settings.connect_timeout_s, reconnect_s=0.0, context=context)
    with way.link() as link:
        job, checkpoint = agree(link, invitation, settings.policy, settings.model)
        parts = load_client_parts(checkpoint, job)
        state.put_into(parts)
        parts.train_mode(False)
        trunk = trunk_of(link, job, parts, job.cohort.deadline_s + GRACE_S)
        longest = longest_row(job, context_length(checkpoint.config))
        yield JointModel(parts, trunk, load_tokenizer(checkpoint), longest, state.source)


def _pieces(lengths: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    """The rows in their order, at most so many tokens at once, or one row."""
    piece: list[int] = []
    for length in lengths:
        if piece and sum(piece) + length > most:
            yield tuple(piece)
            piece = []
        piece.append(length)
    yield tuple(piece)


def _without_targets(lengths: tuple[int, ...]) -> Batch:
    """What a trunk needs to know of a batch."""
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(nothing, lengths, nothing, nothing, nothing)
