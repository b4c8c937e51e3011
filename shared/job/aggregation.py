"""How a round's updates become what all go on from."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from shared.job.settings import Settings

PersonalPart = Literal["head", "tail"]


class AnyAggregation(Settings):
    """What all kinds of aggregation share; each is described, with its paper, in worker_server/aggregators.

    `max_update_norm`: what a client changed in a round (head, tail and its own adapter in the trunk) is scaled down to
    this L2 norm where it is larger. `proximal_mu`: FedProx (Li et al., arXiv 1812.06127, section 3.2): mu / 2 |w -
    w_round|^2 is added to every client's loss, w_round what it began the round with.
    `lora`: factors A and B are each aggregated ("average": the mean of products is not the product of means); so, and
    what that leaves out is added to the frozen weights ("exact": FedEx-LoRA, arXiv 2410.09432); or A stays as it was
    drawn from the seed, and B alone is trained ("freeze_a": FFA-LoRA, arXiv 2403.12313).
    `secure`: whether the server sees the sum of the clients' updates of head and tail alone (SecAgg, Bonawitz et al.,
    CCS 2017; SecAgg+, Bell et al., CCS 2020), or each of them (off). null: SecAgg wherever that hides anything, which
    takes rounds of three clients; `Job.secure` is what follows. ring (after ACCESS-FL, Nguyen et al., arXiv 2409.01722,
    and CESA, arXiv 2405.01144) is for groups that hardly change: one request a sum in place of four, for less: two
    members and the server together can unmask a third, and whoever is lost while a sum is made costs the others it.
    `group_key`: the fingerprint of a key that the data owners share (`flglm keys group`): they alone see the sum, and
    the averages that come of it (docs/adr/0023-group-key-in-rounds.md). null: the server sees them.
    `personal`: parts that are trained and never leave their client: the tail (FedPer, Arivazhagan et al., arXiv
    1912.00818, section 3: personalization layers over shared ones) or the head (LG-FedAvg, Liang et al., arXiv
    2001.01523, section 3: local representations under a shared model).
    """

    robust: ClassVar[bool] = False
    """It compares single updates: neither sums of them nor means suffice."""
    least_updates: ClassVar[int] = 1

    max_update_norm: Annotated[float, Field(gt=0)] | None = None
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    lora: Literal["average", "exact", "freeze_a"] = "average"
    secure: Literal["secagg", "secagg+", "ring", "off"] | None = None

    @field_validator("secure", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """In YAML 1.1 a bare `off` is false."""
        return "off" if value is False else value

    group_key: Annotated[str, Field(pattern=r"^([A-Z2-7]{5}-){5}[A-Z2-7]{5}$")] | None = None

    @field_validator("group_key", mode="before")
    @classmethod
    def _which_key(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("the fingerprint of the group's key is due, which flglm keys group prints; or null")
        return value

    personal: tuple[PersonalPart, ...] = ()

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


class FedSgd(AnyAggregation):
    """Clients hand in gradients, and all take the same step, with the job's optimizer: rounds of one step."""

    type: Literal["fedsgd"] = "fedsgd"


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


def _fedavg_by_default(value: Any) -> Any:
    """Settings without a type are those of the default."""
    return {"type": "fedavg"} | value if isinstance(value, dict) and "type" not in value else value


Aggregation = Annotated[
    FedAvg | FedAvgM | FedAdam | FedYogi | FedSgd | Scaffold | Median | TrimmedMean | Krum | MultiKrum,
    Field(discriminator="type"),
    BeforeValidator(_fedavg_by_default),
]
