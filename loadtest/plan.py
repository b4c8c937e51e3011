"""What a load test is made of."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=3_600, allow_inf_nan=False)]


class Plan(BaseModel):
    """`clients` connect evenly over `ramp_s`; then it is measured for `seconds`.

    Clients train in rounds of `local_steps`; while one waits for a round to begin, it has the trunk evaluate its rows.
    It thinks before each step, exponentially distributed around its own mean: `think_s` times a factor drawn from
    a lognormal with `pace_spread`. Rows have from `shortest` to `longest` tokens, evenly in the logarithm.

    Shares of the clients: `churning` ones leave about every `stay_s`, half of them without a word, and come back as
    new connections; `slow` ones read what came only every `slow_s`, and have rows evaluated only, since a round would
    wait for them; `malicious` ones are admitted and send garbage,
    `malice_per_s` messages each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    clients: Count = 100
    seconds: Annotated[float, Field(gt=0, le=3_600)] = 20.0
    ramp_s: Seconds = 5.0
    think_s: Seconds = 1.0
    pace_spread: Annotated[float, Field(ge=0, le=3)] = 0.5
    rows: Annotated[int, Field(ge=1, le=64)] = 1
    shortest: Annotated[int, Field(ge=1, le=4096)] = 8
    longest: Annotated[int, Field(ge=1, le=4096)] = 64
    churning: Share = 0.05
    stay_s: Annotated[float, Field(gt=0)] = 10.0
    slow: Share = 0.02
    slow_s: Annotated[float, Field(gt=0)] = 2.0
    malicious: Share = 0.01
    malice_per_s: Annotated[float, Field(gt=0, le=10_000)] = 20.0
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    hidden_size: Annotated[int, Field(ge=8, le=16_384)] = 64
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError("shortest is longer than longest")
        if self.slow_clients + self.hostile >= self.clients:
            raise ValueError("slow, malicious: somebody has to train")
        if self.churning + self.slow + self.malicious > 1:
            raise ValueError("churning, slow, malicious: more than everybody")
        if self.processes > self.clients:
            raise ValueError("processes: more than clients")
        return self

    @property
    def hostile(self) -> int:
        """How many clients are malicious."""
        return round(self.clients * self.malicious)

    @property
    def slow_clients(self) -> int:
        return round((self.clients - self.hostile) * self.slow)

    @property
    def trainers(self) -> int:
        """How many clients take part in rounds."""
        return self.clients - self.hostile - self.slow_clients
