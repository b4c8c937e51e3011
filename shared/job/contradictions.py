"""Settings that contradict each other: each check names them, and what to change."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from shared.job.aggregation import AnyKrum, FedAvg, FedSgd, Scaffold, TrimmedMean
from shared.job.group_contradictions import group
from shared.job.methods import Lora
from shared.job.privacy_contradictions import privacy
from shared.job.secure import least_quorum, neighbourhood
from shared.secure_aggregation.terms import MIN_CLIENTS

if TYPE_CHECKING:
    from shared.job.job import Job


def first_contradiction(job: "Job") -> str | None:
    """One line, or None."""
    for check in CHECKS:
        for fault in check(job):
            return fault
    return None


def _cohort(job: "Job") -> Iterator[str]:
    cohort, training, method = job.cohort, job.training, job.method
    if len(set(training.parts)) != len(training.parts):
        yield "training.parts names a part twice"
    if cohort.members > cohort.clients:
        yield f"cohort.sampled={cohort.sampled} is larger than cohort.clients={cohort.clients}, with which rounds begin"
    if cohort.effective_quorum > cohort.members:
        drawn_from = "cohort.clients" if cohort.sampled is None else "cohort.sampled"
        yield f"cohort.quorum is larger than {drawn_from}: no round would ever begin"
    if cohort.deadline_mads is not None and cohort.mode == "greedy":
        yield "cohort.deadline_mads is about steps of all members: it needs cohort.mode=lockstep"
    if cohort.deadline_mads is not None and cohort.effective_quorum == cohort.members:
        yield (
            "cohort.deadline_mads leaves late members behind, and a round without one of them is undone: it needs a "
            f"cohort.quorum of fewer than {cohort.members}"
        )
    if cohort.sampled is not None and cohort.replicas > 1:
        yield (
            f"cohort.sampled={cohort.sampled} draws from all clients, and each of cohort.replicas={cohort.replicas} "
            "servers knows only its own"
        )
    own = method.type in ("lora", "prefix") and "trunk" in training.parts
    if cohort.adapters == "per_client" and not own:
        yield "cohort.adapters=per_client needs method.type=lora or prefix, and trunk among training.parts"
    if cohort.adapters == "per_client" and isinstance(method, Lora) and method.use_dora:
        yield (
            "method.use_dora divides by the norm of each client's whole adapted weight, which "
            "cohort.adapters=per_client never builds: use shared adapters, or LoRA without use_dora"
        )
    accumulated = training.gradient_accumulation_steps
    if cohort.mode == "greedy" and accumulated > 1:
        yield (
            f"training.gradient_accumulation_steps={accumulated} needs cohort.mode=lockstep: in greedy mode every "
            "batch is a step"
        )
    if cohort.mode == "lockstep" and cohort.in_flight > accumulated:
        yield (
            f"cohort.in_flight={cohort.in_flight} needs training.gradient_accumulation_steps of as many in "
            "lockstep: a client has only batches of one step under way"
        )
    batch_tokens = training.per_device_train_batch_size * job.data.max_length
    if batch_tokens > cohort.max_batch_tokens:
        yield (
            f"a batch may hold {batch_tokens} tokens (training.per_device_train_batch_size x data.max_length), "
            f"more than cohort.max_batch_tokens={cohort.max_batch_tokens}"
        )


def _weights(job: "Job") -> Iterator[str]:
    training, full = job.training, job.method.type == "full"
    if training.trunk_dtype != "float32" and full and "trunk" in training.parts:
        yield f"training.trunk_dtype={training.trunk_dtype} is for frozen weights; method.type=full trains them"
    if training.from_scratch and not (full and len(training.parts) == 3):
        yield (
            "training.from_scratch=true begins with random weights: it needs method.type=full and all three of "
            "training.parts"
        )


def _plain_fedavg(job: "Job") -> Iterator[str]:
    if job.split.trunk != "client":
        return
    for setting, value, only, reason in (
        ("cohort.mode", job.cohort.mode, "lockstep", "the server has no trunk that could be free"),
        ("cohort.adapters", job.cohort.adapters, "shared", "there are no adapters at the server"),
        ("cohort.in_flight", job.cohort.in_flight, 1, "batches stay where they are"),
        ("wire.hidden", job.wire.hidden, "float32", "no hidden states travel"),
        ("wire.gradient", job.wire.gradient, "float32", "no gradients travel"),
    ):
        if value != only:
            yield f"{setting}={value} contradicts split.trunk=client: {reason}"


def _prompt(job: "Job") -> Iterator[str]:
    method, parts = job.method, job.training.parts
    if method.type != "prompt":
        return
    if parts != ("head",):
        yield (f"method.type=prompt trains embeddings in the head alone: training.parts={list(parts)} must be [head]")
    if method.num_virtual_tokens + 2 > job.data.max_length:
        yield (
            f"method.num_virtual_tokens={method.num_virtual_tokens} leaves no room for rows in "
            f"data.max_length={job.data.max_length}, which counts both"
        )


def _aggregation(job: "Job") -> Iterator[str]:
    aggregation, quorum = job.aggregation, job.cohort.effective_quorum
    name = f"aggregation.type={aggregation.type}"
    per_client = job.cohort.adapters == "per_client"
    at_clients = bool(job.handed_in)
    shared_trunk = "trunk" in job.training.parts and "trunk" not in job.client_parts and not per_client
    for part in aggregation.personal:
        if part not in job.training.parts:
            yield f"aggregation.personal names {part}, which is not among training.parts"
    if len(set(aggregation.personal)) != len(aggregation.personal):
        yield "aggregation.personal names a part twice"
    elsewhere = {"secure": None, "personal": (), "group_key": None}
    if aggregation.model_copy(update=elsewhere) != FedAvg() and not at_clients and not per_client:
        yield (
            f"aggregation (type={aggregation.type}) has nothing to aggregate: add head or tail to training.parts"
            f"{', take one out of aggregation.personal' if aggregation.personal else ''}, or set "
            "cohort.adapters=per_client"
        )
    yield from _lora(job)
    if aggregation.robust and shared_trunk:
        yield (
            f"{name} cannot look at a trunk that all train at once: set cohort.adapters=per_client, or leave trunk out "
            "of training.parts"
        )
    if quorum < aggregation.least_updates:
        yield f"{name} needs rounds of {aggregation.least_updates} clients at least; cohort.quorum is {quorum}"
    if isinstance(aggregation, TrimmedMean) and aggregation.cut(quorum) == 0:
        yield (
            f"aggregation.trim_ratio={aggregation.trim_ratio:g} of {quorum} clients (cohort.quorum) leaves nobody "
            f"out: it takes 1/{quorum} at least"
        )
    if isinstance(aggregation, AnyKrum) and quorum < 2 * aggregation.byzantine + 3:
        yield (
            f"{name} with aggregation.byzantine={aggregation.byzantine} needs rounds of 2 x byzantine + 3 = "
            f"{2 * aggregation.byzantine + 3} clients at least; cohort.quorum is {quorum}"
        )
    if isinstance(aggregation, Scaffold):
        yield from _scaffold(job)
    if isinstance(aggregation, FedSgd):
        yield from _fedsgd(job)


def _compression(job: "Job") -> Iterator[str]:
    """Of what clients hand in, and of what they are told."""
    wire, aggregation = job.wire, job.aggregation
    up = f"wire.update={wire.update}, wire.update_density={wire.update_density:g}"
    down = f"wire.average={wire.average}, wire.average_density={wire.average_density:g}"
    for compresses, settings in ((wire.compresses_updates, up), (wire.compresses_averages, down)):
        if not compresses:
            continue
        if not job.handed_in:
            yield f"{settings} have nothing to act on: add head or tail to training.parts"
        if isinstance(aggregation, Scaffold):
            yield f"{settings} contradict aggregation.type=scaffold, whose control variates are read off whole updates"
        if aggregation.lora == "exact":
            yield f"{settings} contradict aggregation.lora=exact: what is left out would not be in its residual"
    if aggregation.robust and wire.update_density < 1.0:
        yield (
            f"wire.update_density={wire.update_density:g} contradicts aggregation.type={aggregation.type}: each client "
            "sends other values, and most of what would be compared is 0; wire.update alone goes with it"
        )


def _lora(job: "Job") -> Iterator[str]:
    aggregation = job.aggregation
    name = f"aggregation.lora={aggregation.lora}"
    if aggregation.lora != "average" and job.method.type != "lora":
        yield f"{name} needs method.type=lora"
    if aggregation.lora != "average" and isinstance(job.method, Lora) and job.method.use_dora:
        yield f"{name} is about products of two factors: it needs method.use_dora=false"
    if aggregation.lora == "exact" and aggregation.type != "fedavg":
        yield f"{name} makes a weighted mean exact: it needs aggregation.type=fedavg"
    if aggregation.lora == "exact" and job.cohort.adapters == "per_client" and job.training.trunk_dtype != "float32":
        yield f"{name} adds to the trunk's frozen weights: it needs training.trunk_dtype=float32"


def _scaffold(job: "Job") -> Iterator[str]:
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
    if missing:
        yield f"aggregation.type=scaffold needs {', '.join(missing)}"


def _fedsgd(job: "Job") -> Iterator[str]:
    """Gradients of the same parameters, once a step, exactly the mean that one process would have."""
    wire = job.wire
    wants = (
        (job.rounds.local_steps == 1, "rounds.local_steps=1"),
        (job.rounds.weighting == "tokens", "rounds.weighting=tokens"),
        (job.cohort.mode == "lockstep", "cohort.mode=lockstep"),
        (job.cohort.adapters == "shared", "cohort.adapters=shared"),
        (job.cohort.replicas == 1, "cohort.replicas=1"),
        (job.privacy.type == "none", "privacy.type=none"),
        (job.aggregation.proximal_mu == 0, "aggregation.proximal_mu=0"),
        (not wire.compresses_updates, "wire.update=float32 and wire.update_density=1"),
        (not wire.compresses_averages, "wire.average=float32 and wire.average_density=1"),
    )
    missing = [setting for holds, setting in wants if not holds]
    if missing:
        yield f"aggregation.type=fedsgd needs {', '.join(missing)}"


def _secure(job: "Job") -> Iterator[str]:
    aggregation, clients, quorum = job.aggregation, job.cohort.clients, job.cohort.effective_quorum
    members = job.cohort.members
    name = f"aggregation.secure={job.secure}"
    see_all = "set aggregation.secure=off: the server then sees every client's update"
    if job.secure == "off":
        return
    if not job.handed_in:
        yield f"{name} has nothing to mask: training.parts={list(job.training.parts)} leaves out what clients hold"
    if quorum < MIN_CLIENTS:
        least = MIN_CLIENTS if job.secure == "ring" else least_quorum(max(members, MIN_CLIENTS))
        yield (
            f"{name} needs rounds of {MIN_CLIENTS} clients at least, in which a sum hides something; cohort.quorum is "
            f"{quorum}: set it to {least} at least (and as many cohort.clients), or {see_all}"
        )
        return
    if aggregation.needs_single_updates:
        yield f"{_single(job)} looks at every client's update, which {name} hides: {see_all}"
    if (share := clients // job.cohort.replicas) < MIN_CLIENTS:
        yield (
            f"{name} masks each client's update among those of its server: cohort.replicas={job.cohort.replicas} leave "
            f"one {share} of cohort.clients={clients}, and {MIN_CLIENTS} are due: run fewer, or {see_all}"
        )
        return
    if job.wire.compresses_updates:
        yield (
            f"wire.update={job.wire.update}, wire.update_density={job.wire.update_density:g} send part of an update, "
            f"which {name} cannot mask: {see_all}"
        )
    if job.secure == "ring":
        if job.cohort.sampled is not None:
            yield (
                f"{name} is for groups that hardly change, and cohort.sampled={job.cohort.sampled} draws another each "
                "round, with keys to agree on each time: set aggregation.secure=secagg or secagg+"
            )
        return
    neighbours, threshold = neighbourhood(job, members)
    if job.cohort.replicas == 1 and neighbours == members - 1 and quorum <= threshold:
        yield (
            f"cohort.quorum={quorum} of rounds of {members} clients is too few for {name}, where more than half of a "
            f"client's neighbours must help to unmask: set it to {least_quorum(members)} at least, or {see_all}"
        )


def _single(job: "Job") -> str:
    """The setting that needs single updates."""
    aggregation = job.aggregation
    if aggregation.robust:
        return f"aggregation.type={aggregation.type}"
    if aggregation.max_update_norm is not None:
        return f"aggregation.max_update_norm={aggregation.max_update_norm:g}"
    return f"aggregation.lora={aggregation.lora}"


CHECKS: tuple[Callable[["Job"], Iterator[str]], ...] = (
    _cohort,
    _weights,
    _plain_fedavg,
    _prompt,
    _aggregation,
    _secure,
    group,
    privacy,
    _compression,
)
