"""The broker's settings."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.wire.envelope import Seconds

Positive = Annotated[int, Field(ge=1)]
PerSecond = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BrokerSettings(BaseModel):
    """Addresses to bind (`tcp://*:5555`, `tcp://127.0.0.1:*`, `ipc://...`), times and limits."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    frontend: str = "tcp://127.0.0.1:5555"
    """Where clients connect."""
    backend: str = "tcp://127.0.0.1:5556"
    """Where servers connect."""
    heartbeat_s: Seconds = 2.0
    """How often workers ping."""
    timeout_s: Seconds = 15.0
    """A worker silent for this long is gone."""
    max_peers: Positive = 4096
    """Connected workers, clients and servers together."""
    max_sessions_per_client: Positive = 4
    """Open sessions of one client connection."""
    max_unanswered: Positive = 128
    """Messages of a session, one after the other, to which the server says nothing; more end it."""
    max_connections_per_worker: Positive = 16
    """Connections of one admitted client or server."""
    max_messages_per_s: PerSecond = 20_000.0
    """What one worker may send; what is more waits."""
    max_bytes_per_s: PerSecond = 2.0**31
    """The same, in bytes."""
    max_waiting: Positive = 256
    """Messages of one worker that may wait before it loses its connection."""
    max_frame_bytes: Positive = 2**31
    """Larger frames end the connection that sent them."""
    high_water_mark: Positive = 1000
    """Messages queued towards one client before it counts as too slow."""
    server_high_water_mark: Positive = 16_384
    """The same towards one server, to which many clients send."""

    @model_validator(mode="after")
    def _pings_come_in_time(self) -> Self:
        if self.timeout_s <= self.heartbeat_s:
            raise ValueError("timeout_s must be larger than heartbeat_s: whoever pings in time would count as gone")
        return self
