"""On what, when and with whom a job trains: data, rounds, cohorts, the numbers on the wire."""

from typing import Annotated, Literal

from pydantic import Field

from shared.job.settings import Positive, Seconds, Settings

WireFormat = Literal["float32", "bfloat16", "float16", "int8", "int4"]
Density = Annotated[float, Field(gt=0, le=1)]


class Split(Settings):
    """How many blocks stay with the client, before (`head_blocks`) and after (`tail_blocks`) the trunk.

    `trunk: client` is plain FedAvg, what splitting is compared with: every client holds and trains the whole model, and
    nothing but its updates travels.
    """

    head_blocks: Positive = 1
    tail_blocks: Positive = 1
    trunk: Literal["server", "client"] = "server"


class Data(Settings):
    """Rows longer than `max_length` tokens are truncated or skipped, and counted either way."""

    max_length: Annotated[int, Field(ge=2, le=1_048_576)] = 256
    too_long: Literal["truncate", "skip"] = "truncate"


class Rounds(Settings):
    """`count` rounds of `local_steps` steps each; after each, clients' heads and tails are aggregated.

    `weighting`: what a mean weighs a client by, its target tokens in the round or its rows; or all clients alike.
    """

    count: Positive = 10
    local_steps: Positive = 10
    weighting: Literal["tokens", "rows", "clients"] = "tokens"
    evaluate_every: Positive = 1


class Cohort(Settings):
    """Who steps together. Training starts with `clients` clients; a step waits `deadline_s` for the last of them, in
    plain FedAvg a round so long for each of its local steps.

    `sampled`: a round takes so many of the clients that are known by then, drawn from training.seed; null takes all.
    `quorum`: with fewer members a round is undone, and waits for those who are missing; by default with any fewer than
    `sampled` or `clients`, so that a run which lost somebody for a while ends as if it had not. With a smaller one the
    draw passes over who is not there.
    `replicas`: over how many servers the clients are spread, where updates are masked: each is summed among those of
    its server, so clients must know how few that may be.
    `deadline_mads`: in lockstep a step waits the median and so many median absolute deviations of its members' recent
    times, `deadline_s` at most (worker_server/deadlines.py); null waits `deadline_s`.
    `mode`: lockstep, where every step is one of all clients, exactly; or greedy, where the trunk takes what is there,
    and a cohort's backward waits `patience_s` for the last gradient. `in_flight`: how many batches (lockstep: of one
    step) a client has under way at once, to hide the network's delay.
    `adapters`: one set in the trunk, trained by all, or one a client (of at most `clients`), averaged after each round.
    """

    clients: Annotated[int, Field(ge=1, le=4096)] = 1
    sampled: Annotated[int, Field(ge=1, le=4096)] | None = None
    quorum: Annotated[int, Field(ge=1, le=4096)] | None = None
    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    adapters: Literal["shared", "per_client"] = "shared"
    mode: Literal["lockstep", "greedy"] = "lockstep"
    in_flight: Annotated[int, Field(ge=1, le=16)] = 1
    deadline_s: Seconds = 120.0
    deadline_mads: Annotated[float, Field(gt=0, le=1000)] | None = None
    patience_s: Seconds = 1.0
    max_batch_tokens: Annotated[int, Field(ge=1, le=2**24)] = 65_536

    @property
    def members(self) -> int:
        """How many a round has, if all are there; without sampling, more once more have joined."""
        return self.clients if self.sampled is None else self.sampled

    @property
    def effective_quorum(self) -> int:
        """`quorum`, or where it is not named all `members`."""
        return self.members if self.quorum is None else self.quorum


class Wire(Settings):
    """The number format of hidden states and of gradients on the wire; layouts in docs/protocol.md.

    `update`: that of what clients hand in after a round; `update_density`: the share of the values that goes up, those
    that changed most. `average`, `average_density`: the same for what goes down. What is left out or rounded off is
    added to what goes the next time (shared/error_feedback.py).
    """

    hidden: WireFormat = "float32"
    gradient: WireFormat = "float32"
    update: WireFormat = "float32"
    update_density: Density = 1.0
    average: WireFormat = "float32"
    average_density: Density = 1.0

    @property
    def compresses_updates(self) -> bool:
        """Whether part of a difference goes up, in place of values."""
        return self.update != "float32" or self.update_density < 1.0

    @property
    def compresses_averages(self) -> bool:
        """Whether part of a difference goes down, to clients that hold what it differs from."""
        return self.average != "float32" or self.average_density < 1.0
