"""The whole job, from a file or from the wire, and what follows from its settings."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from shared.job.aggregation import Aggregation, FedAvg
from shared.job.contradictions import first_contradiction
from shared.job.methods import Lora, Method, TrainedPart, Training
from shared.job.privacy import NoPrivacy, Privacy
from shared.job.rounds import Cohort, Data, Rounds, Split, Wire
from shared.job.secure import Secure, secure_of
from shared.job.settings import Settings
from shared.yaml_files import read_mapping, validated


class Job(Settings):
    """One training task."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")] = "job"
    model_name_or_path: Annotated[str, Field(min_length=1, max_length=4096)]
    split: Split = Split()
    method: Method = Lora()
    training: Training = Training()
    data: Data = Data()
    rounds: Rounds = Rounds()
    cohort: Cohort = Cohort()
    aggregation: Aggregation = FedAvg()
    privacy: Privacy = NoPrivacy()
    wire: Wire = Wire()

    @model_validator(mode="after")
    def _consistent(self) -> "Job":
        if fault := first_contradiction(self):
            raise ValueError(fault)
        return self

    @property
    def client_parts(self) -> tuple[TrainedPart, ...]:
        """The parts that clients hold, train and hand in."""
        return ("head", "trunk", "tail") if self.split.trunk == "client" else ("head", "tail")

    @property
    def handed_in(self) -> tuple[TrainedPart, ...]:
        """The parts whose updates leave the clients."""
        return tuple(
            part for part in self.client_parts if part in self.training.parts and part not in self.aggregation.personal
        )

    @property
    def exchanges_gradients(self) -> bool:
        """Whether clients hand in gradients, in place of what local steps made of their parameters."""
        return self.aggregation.type == "fedsgd"

    @property
    def secure(self) -> Secure:
        """How the updates of what clients hold are masked."""
        return secure_of(self)

    @property
    def keeps_round_start(self) -> bool:
        """Whether clients keep what a round began with, of what they hand in: differences, sums, private updates,
        proximal terms and control variates are to it.
        """
        wire, aggregation = self.wire, self.aggregation
        return (
            wire.compresses_updates
            or wire.compresses_averages
            or self.secure != "off"
            or self.privacy.type != "none"
            or aggregation.proximal_mu > 0
            or aggregation.type == "scaffold"
        )

    @property
    def drawn_from(self) -> int | None:
        """The seed that the model's weights are drawn from; None where they are read."""
        return self.training.seed if self.training.from_scratch else None

    @property
    def prefix_tokens(self) -> int:
        """How many positions come before those of every row."""
        return self.method.num_virtual_tokens if self.method.type == "prefix" else 0

    @property
    def prompt_tokens(self) -> int:
        """How many virtual tokens come before those of every row."""
        return self.method.num_virtual_tokens if self.method.type == "prompt" else 0

    @property
    def total_steps(self) -> int:
        return self.rounds.count * self.rounds.local_steps

    def canonical(self) -> bytes:
        """The job as canonical JSON: sorted keys, no spaces, ASCII."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> bytes:
        """SHA-256 of `canonical()`, 32 bytes."""
        return hashlib.sha256(self.canonical()).digest()


def parse_job(values: Any, source: str) -> Job:
    """A Job from plain data. Raises JobError: one line, with the setting's name and, for unknown ones, the nearest."""
    return validated(values, Job, source)


def load_job(path: Path) -> Job:
    """Read a YAML job file. Raises JobError."""
    return parse_job(read_mapping(path, "job file"), str(path))
