"""Where the server finds things and how much it takes on; what is trained is the job's affair."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from shared.wire.curve import Door


class ServerSettings(BaseModel):
    """Fields: where brokers listen to servers, the folder for checkpoints, limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    brokers: Annotated[tuple[Door, ...], Field(min_length=1, max_length=16)] = (Door("tcp://127.0.0.1:5556"),)
    # How long the server goes on without any of them.
    broker_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    state: Path = Path("server-state")
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    # This server's number among those that train one job together, how many there are, and where they meet.
    replica: Annotated[int, Field(ge=0, lt=4096)] = 0
    replicas: Annotated[int, Field(ge=1, le=4096)] = 1
    rendezvous: str | None = None
    replica_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    connect_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    # A cohort is computed in pieces of at most so many tokens: larger ones miss a CPU's caches. None: 1,024 on a CPU,
    # and whole elsewhere. Gradients are the same.
    piece_tokens: Annotated[int, Field(ge=1)] | None = None
    # Forwards that wait for their gradients keep graphs of so many tokens at most; what is over is computed again.
    max_kept_tokens: Annotated[int, Field(ge=0)] = 2**18
    # Generation: keys and values of so many tokens, over all streams.
    max_cached_tokens: Annotated[int, Field(ge=0)] = 2**18
    max_streams_per_session: Annotated[int, Field(ge=1)] = 16
    max_sessions: Annotated[int, Field(ge=1)] = 1024
    # A session whose client has not sent a record after this long was, perhaps, a replayed greeting.
    silent_session_s: Annotated[float, Field(gt=0)] = 30.0
    # How long the server stays after the last round for clients to fetch the result and evaluate it.
    farewell_s: Annotated[float, Field(ge=0)] = 120.0
    # After that it goes on answering evaluations and generation, until it is stopped.
    keep_serving: bool = False
