"""What benchmarks.methods compares: a row a method, a setting, an aggregation.

Learning rates were chosen on the centralised run alone, by the loss on rows that are neither trained on nor measured on
(Corpus.tune), among 1, 3, 10, ... times 1e-4: `python -m benchmarks.methods --tune` measures the best and its
neighbours again. Joint runs, plain FedAvg's too, take the same rate. What aggregation methods add was not tuned.

Found so, at 60 steps, seed 0 (loss on the `tune` rows):
    medquad full     3e-4 5.744, 1e-3 5.358, 3e-3 6.132, 1e-2 6.964
    medquad lora     3e-3 6.969, 1e-2 6.862, 3e-2 8.155
    medquad prefix   1e-1 7.515, 3e-1 7.509, 1.0 8.040
    medquad prompt   1e-2 7.881, 3e-2 7.678, 1e-1 7.694, 3e-1 7.771
    tasks full       3e-4 0.311, 1e-3 0.290, 3e-3 0.301
    tasks lora       1e-3 0.352, 3e-3 0.307, 1e-2 0.354
    tasks prefix     1e-2 0.596, 3e-2 0.478, 1e-1 0.486
    tasks prompt     3e-2 1.721, 1e-1 0.654, 3e-1 0.593, 1.0 0.910
    medquad rslora   1e-3 7.045, 3e-3 6.827, 1e-2 8.253
    tasks rslora     1e-3 0.304, 3e-3 0.292, 1e-2 1.722
    medquad SGD      lora 1.0 9.797, 3.0 8.680, 10 8.872; full 3e-3 6.811, 1e-2 6.473, 3e-2 7.477
    tasks SGD        lora 1.0 2.224, 3.0 1.773, 10 5.763; full 3e-4 0.323, 1e-3 0.315, 3e-3 0.348
DoRA takes LoRA's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shared.job import Full, Lora, Method, Prefix, Prompt, TrainedPart

VIRTUAL_TOKENS = 16
WARMUP_RATIO = 0.1


@dataclass(frozen=True)
class MethodRow:
    """`rates`: the learning rate by corpus. `trunk` is at the server, or with plain FedAvg at every client."""

    method: Method
    rates: Mapping[str, float]
    trunk: Literal["server", "client"] = "server"

    @property
    def parts(self) -> tuple[TrainedPart, ...]:
        return ("head",) if self.method.type == "prompt" else ("head", "trunk", "tail")

    @property
    def virtual_tokens(self) -> int:
        """How many of a row's `data.max_length` tokens are prompts."""
        return self.method.num_virtual_tokens if self.method.type == "prompt" else 0


LORA_RATES = {"medquad": 1e-2, "tasks": 3e-3}
RSLORA_RATES = {"medquad": 3e-3, "tasks": 3e-3}
FULL_RATES = {"medquad": 1e-3, "tasks": 1e-3}

METHODS: dict[str, MethodRow] = {
    "lora": MethodRow(Lora(r=8), LORA_RATES),
    "lora+rslora": MethodRow(Lora(r=8, use_rslora=True), RSLORA_RATES),
    "lora+dora": MethodRow(Lora(r=8, use_dora=True), LORA_RATES),
    "full": MethodRow(Full(), FULL_RATES),
    "prefix": MethodRow(Prefix(num_virtual_tokens=VIRTUAL_TOKENS), {"medquad": 3e-1, "tasks": 3e-2}),
    "prompt": MethodRow(Prompt(num_virtual_tokens=VIRTUAL_TOKENS), {"medquad": 3e-2, "tasks": 3e-1}),
    "plain_fedavg lora": MethodRow(Lora(r=8), LORA_RATES, "client"),
    "plain_fedavg full": MethodRow(Full(), FULL_RATES, "client"),
}


@dataclass(frozen=True)
class Setting:
    """`clients` of them; rows dealt by their source, or at random. `fedsgd`: gradients of head and tail every step."""

    clients: int
    by_source: bool
    fedsgd: bool = False


SETTINGS: dict[str, Setting] = {
    "1 client": Setting(1, False),
    "3 clients IID": Setting(3, False),
    "3 clients by source": Setting(3, True),
    "3 clients IID, FedSGD": Setting(3, False, fedsgd=True),
    "3 clients by source, FedSGD": Setting(3, True, fedsgd=True),
}
IID, BY_SOURCE = "3 clients IID", "3 clients by source"
FEDSGD_IID, FEDSGD_BY_SOURCE = f"{IID}, FedSGD", f"{BY_SOURCE}, FedSGD"
FEDSGD: Mapping[str, Any] = {"type": "fedsgd"}

# Where several local steps let clients drift apart, by source. SCAFFOLD needs plain SGD, and is compared with that.
DRIFT_METHODS = ("lora", "plain_fedavg full")
SERVER_RATE = 1e-3
# On the tasks one process takes 3.0; the clients' steps, of a third of the rows each, grow without bound with it.
SGD_RATES = {"lora": {"medquad": 3.0, "tasks": 1.0}, "plain_fedavg full": {"medquad": 1e-2, "tasks": 1e-3}}
FEDAVG: Mapping[str, Any] = {"type": "fedavg"}
WITH_ADAMW: dict[str, Mapping[str, Any]] = {
    "fedavg": FEDAVG,
    "fedprox": {"type": "fedavg", "proximal_mu": 0.1},
    "fedavgm": {"type": "fedavgm", "momentum": 0.5},
    "fedadam": {"type": "fedadam", "server_learning_rate": SERVER_RATE},
    "fedyogi": {"type": "fedyogi", "server_learning_rate": SERVER_RATE},
}
# Of the SGD that SCAFFOLD takes.
SGD: Mapping[str, Any] = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "max_grad_norm": None,
}
WITH_SGD: dict[str, Mapping[str, Any]] = {"fedavg": FEDAVG, "scaffold": {"type": "scaffold"}}
