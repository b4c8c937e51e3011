"""The job: one training task, described by the server's job file and sent to every client.

One source for all settings: YAML on disk, JSON on the wire, a SHA-256 digest of the canonical JSON in invitations and
handshakes, so that no setting can be changed between operator and client. Names are those of Hugging Face and peft
where those exist.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.yaml_files import read_mapping, validated

WireFormat = Literal["float32", "bfloat16", "float16", "int8", "int4"]
TrainedPart = Literal["head", "trunk", "tail"]
MethodName = Literal["lora", "full", "prefix", "prompt"]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Split(Settings):
    """How many blocks stay with the client, before (`head_blocks`) and after (`tail_blocks`) the trunk.

    `trunk: client` is plain FedAvg, what splitting is compared with: every client holds and trains the whole model, and
    nothing but its updates travels.
    """

    head_blocks: Positive = 1
    tail_blocks: Positive = 1
    trunk: Literal["server", "client"] = "server"


class Lora(Settings):
    """LoRA (arXiv 2106.09685) with peft's names. `target_modules: null` means the family's attention projections.

    `use_rslora` scales by lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), `use_dora` trains magnitudes beside the
    directions (DoRA, arXiv 2402.09353).
    """

    type: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1, le=1024)] = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] | None = None


class Full(Settings):
    """All weights are trained, each part where it lives."""

    type: Literal["full"] = "full"


class Prefix(Settings):
    """Prefix tuning, P-tuning v2 (arXiv 2101.00190, 2110.07602), with peft's names: trained keys and values of
    `num_virtual_tokens` virtual tokens in every layer, each at whoever holds the layer.
    """

    type: Literal["prefix"] = "prefix"
    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 30
    prefix_projection: bool = False

    @model_validator(mode="after")
    def _no_projection(self) -> "Prefix":
        if self.prefix_projection:
            raise ValueError(
                "prefix_projection=true makes all layers' prefixes by one network, which client and server cannot share"
            )
        return self


class Prompt(Settings):
    """Prompt tuning (arXiv 2104.08691): `num_virtual_tokens` trained embeddings before each row, at the client alone.

    Rows of `data.max_length` tokens have them in it.
    """

    type: Literal["prompt"] = "prompt"
    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 20


Method = Annotated[Lora | Full | Prefix | Prompt, Field(discriminator="type")]


class Training(Settings):
    """Each party's optimizer: AdamW (arXiv 1711.05101) or plain SGD, a schedule over all steps, clipping by the norm of
    the part.

    `from_scratch`: the model's configuration and tokenizer are used, its weights are drawn from `seed`, everywhere the
    same. A step is `gradient_accumulation_steps` batches. `trunk_dtype` is that of the trunk's frozen weights; what is
    trained, optimizers and reductions are float32 always.
    """

    per_device_train_batch_size: Positive = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=64)] = 1
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    parts: Annotated[tuple[TrainedPart, ...], Field(min_length=1)] = ("head", "trunk", "tail")
    trunk_dtype: Literal["float32", "bfloat16"] = "float32"
    from_scratch: bool = False


class Data(Settings):
    """Rows longer than `max_length` tokens are truncated or skipped, and counted either way."""

    max_length: Annotated[int, Field(ge=2, le=1_048_576)] = 256
    too_long: Literal["truncate", "skip"] = "truncate"


class Rounds(Settings):
    """`count` rounds of `local_steps` steps each; after each, clients' heads and tails are aggregated.

    `weighting`: what a mean weighs a client by, its target tokens in the round or its rows.
    """

    count: Positive = 10
    local_steps: Positive = 10
    weighting: Literal["tokens", "rows"] = "tokens"
    evaluate_every: Positive = 1


class Cohort(Settings):
    """Who steps together. Training starts with `clients` clients; a step waits `deadline_s` for the last of them.

    `quorum`: with fewer members a round is undone, and waits for those who are missing; by default with any fewer than
    `clients`, so that a run which lost somebody for a while ends as if it had not.
    `mode`: lockstep, where every step is one of all clients, exactly; or greedy, where the trunk takes what is there,
    and a cohort's backward waits `patience_s` for the last gradient. `in_flight`: how many batches (lockstep: of one
    step) a client has under way at once, to hide the network's delay.
    `adapters`: one set in the trunk, trained by all, or one a client (of at most `clients`), averaged after each round.
    """

    clients: Annotated[int, Field(ge=1, le=4096)] = 1
    quorum: Annotated[int, Field(ge=1, le=4096)] | None = None
    adapters: Literal["shared", "per_client"] = "shared"
    mode: Literal["lockstep", "greedy"] = "lockstep"
    in_flight: Annotated[int, Field(ge=1, le=16)] = 1
    deadline_s: Seconds = 120.0
    patience_s: Seconds = 1.0
    max_batch_tokens: Annotated[int, Field(ge=1, le=2**24)] = 65_536

    @property
    def needed(self) -> int:
        """The quorum."""
        return self.clients if self.quorum is None else self.quorum


class AnyAggregation(Settings):
    """What all kinds of aggregation share; each is described, with its paper, in worker_server/aggregators.

    `max_update_norm`: what a client changed in a round (head, tail and its own adapter in the trunk) is scaled down to
    this L2 norm where it is larger. `proximal_mu`: FedProx (Li et al., arXiv 1812.06127, section 3.2): mu / 2 |w -
    w_round|^2 is added to every client's loss, w_round what it began the round with.
    `lora`: factors A and B are each aggregated ("average": the mean of products is not the product of means); so, and
    what that leaves out is added to the frozen weights ("exact": FedEx-LoRA, arXiv 2410.09432); or A stays as it was
    drawn from the seed, and B alone is trained ("freeze_a": FFA-LoRA, arXiv 2403.12313).
    """

    robust: ClassVar[bool] = False
    """It compares single updates: neither sums of them nor means suffice."""
    least_updates: ClassVar[int] = 1

    max_update_norm: Annotated[float, Field(gt=0)] | None = None
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    lora: Literal["average", "exact", "freeze_a"] = "average"

    @property
    def needs_single_updates(self) -> bool:
        """Whether the server must see each client's update: what masks updates cannot go with it."""
        return self.robust or self.max_update_norm is not None or self.lora == "exact"


class FedAvg(AnyAggregation):
    type: Literal["fedavg"] = "fedavg"


class FedAvgM(AnyAggregation):
    type: Literal["fedavgm"] = "fedavgm"
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class Adaptive(AnyAggregation):
    """`tau` is the adaptivity: the larger, the nearer to FedAvgM."""

    server_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class FedAdam(Adaptive):
    type: Literal["fedadam"] = "fedadam"


class FedYogi(Adaptive):
    type: Literal["fedyogi"] = "fedyogi"


class Scaffold(AnyAggregation):
    type: Literal["scaffold"] = "scaffold"
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0


class Median(AnyAggregation):
    type: Literal["median"] = "median"
    robust: ClassVar[bool] = True
    least_updates: ClassVar[int] = 3


class TrimmedMean(AnyAggregation):
    """`trim_ratio` of the clients' values are left out at either end, rounded down."""

    type: Literal["trimmed_mean"] = "trimmed_mean"
    robust: ClassVar[bool] = True
    least_updates: ClassVar[int] = 3
    trim_ratio: Annotated[float, Field(gt=0, lt=0.5)] = 0.2

    def cut(self, updates: int) -> int:
        """How many of so many are left out at either end. A product of 2.9999999999999996 is 3."""
        return int(self.trim_ratio * updates + 1e-9)


class AnyKrum(AnyAggregation):
    """`byzantine`: how many clients may send anything at all (f)."""

    robust: ClassVar[bool] = True
    least_updates: ClassVar[int] = 3
    byzantine: Annotated[int, Field(ge=0, le=4096)] = 1


class Krum(AnyKrum):
    type: Literal["krum"] = "krum"


class MultiKrum(AnyKrum):
    type: Literal["multi_krum"] = "multi_krum"


Aggregation = Annotated[
    FedAvg | FedAvgM | FedAdam | FedYogi | Scaffold | Median | TrimmedMean | Krum | MultiKrum,
    Field(discriminator="type"),
]


class Wire(Settings):
    """The number format of hidden states and of gradients on the wire; layouts in docs/protocol.md."""

    hidden: WireFormat = "float32"
    gradient: WireFormat = "float32"


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
    wire: Wire = Wire()

    @model_validator(mode="after")
    def _consistent(self) -> "Job":
        if len(set(self.training.parts)) != len(self.training.parts):
            raise ValueError("training.parts names a part twice")
        if self.cohort.needed > self.cohort.clients:
            raise ValueError("cohort.quorum is larger than cohort.clients: no round would ever begin")
        own = self.method.type in ("lora", "prefix") and "trunk" in self.training.parts
        if self.cohort.adapters == "per_client" and not own:
            raise ValueError(
                "cohort.adapters=per_client needs method.type=lora or prefix, and trunk among training.parts"
            )
        if self.cohort.adapters == "per_client" and self.method.type == "lora" and self.method.use_dora:
            raise ValueError(
                "method.use_dora divides by the norm of each client's whole adapted weight, which "
                "cohort.adapters=per_client never builds: use shared adapters, or LoRA without use_dora"
            )
        accumulated = self.training.gradient_accumulation_steps
        if self.cohort.mode == "greedy" and accumulated > 1:
            raise ValueError(
                f"training.gradient_accumulation_steps={accumulated} needs cohort.mode=lockstep: in greedy mode every "
                "batch is a step"
            )
        if self.cohort.mode == "lockstep" and self.cohort.in_flight > accumulated:
            raise ValueError(
                f"cohort.in_flight={self.cohort.in_flight} needs training.gradient_accumulation_steps of as many in "
                "lockstep: a client has only batches of one step under way"
            )
        if self.training.trunk_dtype != "float32" and self.method.type == "full" and "trunk" in self.training.parts:
            raise ValueError(
                f"training.trunk_dtype={self.training.trunk_dtype} is for frozen weights; method.type=full trains them"
            )
        everything = self.method.type == "full" and len(self.training.parts) == 3
        if self.training.from_scratch and not everything:
            raise ValueError(
                "training.from_scratch=true begins with random weights: it needs method.type=full and all three of "
                "training.parts"
            )
        if self.split.trunk == "client":
            _check_plain_fedavg(self.cohort, self.wire)
        if self.method.type == "prompt":
            _check_prompt(self.method, self.training, self.data)
        batch_tokens = self.training.per_device_train_batch_size * self.data.max_length
        if batch_tokens > self.cohort.max_batch_tokens:
            raise ValueError(
                f"a batch may hold {batch_tokens} tokens (training.per_device_train_batch_size x data.max_length), "
                f"more than cohort.max_batch_tokens={self.cohort.max_batch_tokens}"
            )
        if fault := _aggregation_fault(self):
            raise ValueError(fault)
        return self

    @property
    def client_parts(self) -> tuple[TrainedPart, ...]:
        """The parts that clients hold, train and hand in."""
        return ("head", "trunk", "tail") if self.split.trunk == "client" else ("head", "tail")

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


def _check_plain_fedavg(cohort: Cohort, wire: Wire) -> None:
    for setting, value, only, reason in (
        ("cohort.mode", cohort.mode, "lockstep", "the server has no trunk that could be free"),
        ("cohort.adapters", cohort.adapters, "shared", "there are no adapters at the server"),
        ("cohort.in_flight", cohort.in_flight, 1, "batches stay where they are"),
        ("wire.hidden", wire.hidden, "float32", "no hidden states travel"),
        ("wire.gradient", wire.gradient, "float32", "no gradients travel"),
    ):
        if value != only:
            raise ValueError(f"{setting}={value} contradicts split.trunk=client: {reason}")


def _check_prompt(method: Prompt, training: Training, data: Data) -> None:
    if training.parts != ("head",):
        raise ValueError(
            f"method.type=prompt trains embeddings in the head alone: training.parts={list(training.parts)} "
            "must be [head]"
        )
    if method.num_virtual_tokens + 2 > data.max_length:
        raise ValueError(
            f"method.num_virtual_tokens={method.num_virtual_tokens} leaves no room for rows in "
            f"data.max_length={data.max_length}, which counts both"
        )


def _aggregation_fault(job: Job) -> str | None:
    """What contradicts the job's aggregation, if anything does."""
    aggregation, members = job.aggregation, job.cohort.needed
    name = f"aggregation.type={aggregation.type}"
    per_client = job.cohort.adapters == "per_client"
    at_clients = bool(set(job.client_parts) & set(job.training.parts))
    shared_trunk = "trunk" in job.training.parts and "trunk" not in job.client_parts and not per_client
    if aggregation != FedAvg() and not at_clients and not per_client:
        return (
            f"aggregation (type={aggregation.type}) has nothing to aggregate: add head or tail to training.parts, or "
            "set cohort.adapters=per_client"
        )
    if fault := _lora_fault(job):
        return fault
    if aggregation.robust and shared_trunk:
        return (
            f"{name} cannot look at a trunk that all train at once: set cohort.adapters=per_client, or leave trunk out "
            "of training.parts"
        )
    if members < aggregation.least_updates:
        return f"{name} needs rounds of {aggregation.least_updates} clients at least; cohort.quorum is {members}"
    if isinstance(aggregation, TrimmedMean) and aggregation.cut(members) == 0:
        return (
            f"aggregation.trim_ratio={aggregation.trim_ratio:g} of {members} clients (cohort.quorum) leaves nobody "
            f"out: it takes 1/{members} at least"
        )
    if isinstance(aggregation, AnyKrum) and members < 2 * aggregation.byzantine + 3:
        return (
            f"{name} with aggregation.byzantine={aggregation.byzantine} needs rounds of 2 x byzantine + 3 = "
            f"{2 * aggregation.byzantine + 3} clients at least; cohort.quorum is {members}"
        )
    if isinstance(aggregation, Scaffold):
        return _scaffold_fault(job)
    return None


def _lora_fault(job: Job) -> str | None:
    aggregation = job.aggregation
    name = f"aggregation.lora={aggregation.lora}"
    if aggregation.lora != "average" and job.method.type != "lora":
        return f"{name} needs method.type=lora"
    if aggregation.lora != "average" and isinstance(job.method, Lora) and job.method.use_dora:
        return f"{name} is about products of two factors: it needs method.use_dora=false"
    if aggregation.lora == "exact" and aggregation.type != "fedavg":
        return f"{name} makes a weighted mean exact: it needs aggregation.type=fedavg"
    if aggregation.lora == "exact" and job.cohort.adapters == "per_client" and job.training.trunk_dtype != "float32":
        return f"{name} adds to the trunk's frozen weights: it needs training.trunk_dtype=float32"
    return None


def _scaffold_fault(job: Job) -> str | None:
    """Control variates are mean gradients, read off a client's way: it must be the sum of its steps' gradients."""
    training = job.training
    wants = (
        (training.optim == "sgd", "training.optim=sgd"),
        (training.lr_scheduler_type == "constant", "training.lr_scheduler_type=constant"),
        (training.max_grad_norm is None, "training.max_grad_norm=null"),
        (job.cohort.adapters == "shared", "cohort.adapters=shared"),
        (job.aggregation.max_update_norm is None, "aggregation.max_update_norm=null"),
    )
    missing = [setting for holds, setting in wants if not holds]
    return f"aggregation.type=scaffold needs {', '.join(missing)}" if missing else None


def parse_job(values: Any, source: str) -> Job:
    """A Job from plain data. Raises JobError: one line, with the setting's name and, for unknown ones, the nearest."""
    return validated(values, Job, source)


def load_job(path: Path) -> Job:
    """Read a YAML job file. Raises JobError."""
    return parse_job(read_mapping(path, "job file"), str(path))
