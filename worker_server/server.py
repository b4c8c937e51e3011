"""Putting a server together from its settings, a job, an identity and a list of admitted clients."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import torch
import zmq

from shared.flat import Shapes
from shared.identity import Identity, key_digest
from shared.job import Job
from shared.job.replicas import check_replicas
from shared.job.secure import least_quorum, why_off
from shared.logs import event
from shared.masked_updates import check_length
from shared.model.carve import TRUNK_DTYPES, load_part
from shared.model.checkpoint import Checkpoint, checkpoint_of
from shared.model.families import context_length
from shared.model.methods import longest_row
from shared.model.plan import SplitPlan
from shared.model.trainable import initial_values, make_trainable, update_shapes
from shared.monitoring import Health, new_registry
from shared.payload.messages import Welcome
from shared.secure_aggregation.terms import MAX_CLIENTS
from shared.wire.connection import hello
from shared.wire.waker import Waker
from worker_server.brokers import Brokers
from worker_server.cohort_metrics import CohortMetrics
from worker_server.engine import Engine
from worker_server.greedy import Greedy
from worker_server.inference import Inference
from worker_server.intake import Intake
from worker_server.lockstep import Lockstep
from worker_server.masking import Sums
from worker_server.metrics import ServerMetrics
from worker_server.no_trunk import NoTrunk
from worker_server.plain_fedavg import PlainFedavg
from worker_server.progress import Progress
from worker_server.replicas import Place, Replicas, device_of, place_of
from worker_server.ring import AnySums, Rings
from worker_server.rounds import Plan, Rounds
from worker_server.service import Service
from worker_server.sessions import Sessions
from worker_server.settings import ServerSettings
from worker_server.streams import StreamBook, StreamLimits
from worker_server.trunk import Trunk

logger = logging.getLogger(__name__)


def leave_arithmetic_to_the_compute_thread(threads: int | None) -> int:
    """How many threads the compute thread is to use: `threads`, or torch's choice. For a process that only serves.

    A second team of OpenMP threads, idle in another thread, would make the first one sleep and wake at every product,
    which costs a third of its speed (libgomp): from here on all other threads compute alone.
    """
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(1)
    return threads


class Server:
    """`run()` loads the trunk, connects and serves one job to its end. A context may be given for inproc addresses."""

    def __init__(
        self,
        settings: ServerSettings,
        job: Job,
        identity: Identity,
        admitted: Callable[[], Mapping[bytes, str]],
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
    ) -> None:
        self.settings = settings
        self.job = job
        self.identity = identity
        self.admitted = admitted
        self.context = context or zmq.Context.instance()
        self.service: Service | None = None
        self.health = Health()
        self.registry = new_registry()
        self.progress: Progress | None = None
        self._stop = threading.Event()

    @property
    def completed_rounds(self) -> int:
        """Those of the newest checkpoint."""
        return 0 if self.progress is None else self.progress.round

    @property
    def checkpoint(self) -> Path | None:
        """Where the last completed round lies on disk."""
        return None if self.progress is None else self.progress.checkpoint

    @property
    def finished(self) -> bool:
        return self.completed_rounds >= self.job.rounds.count

    def stop(self) -> None:
        """From any thread or a signal handler."""
        self._stop.set()
        if self.service is not None:
            self.service.stop()

    def run(self) -> None:
        """Raises JobError, ModelError, CheckpointError, ConnectionFailed."""
        place = place_of(self.settings)
        check_replicas(self.job, 1 if place is None else place.replicas)
        checkpoint = checkpoint_of(self.job)
        plan = SplitPlan(self.job.split.head_blocks, self.job.split.tail_blocks, checkpoint.config.num_hidden_layers)
        longest_row(self.job, context_length(checkpoint.config))
        trunk = NoTrunk() if "trunk" in self.job.client_parts else self._load_trunk(checkpoint, plan)
        fingerprint = checkpoint.fingerprint()
        state = self.settings.state if place is None else self.settings.state / f"replica-{place.replica}"
        progress = self.progress = Progress(
            state, self.job, fingerprint, trunk, initial=lambda: initial_values(checkpoint, plan, self.job)
        )
        progress.begin()
        shapes = update_shapes(checkpoint.config, plan, self.job)
        sums = self._sums(shapes)
        name = key_digest(self.identity.public)
        greeting = hello("server", name) if place is None else hello("server", name, place.replica, place.replicas)
        with (
            self._replicas(place, progress) as replicas,
            closing(Waker()) as waker,
            Brokers(
                self.context, self.settings.brokers, greeting, self.identity.link, self.settings.broker_timeout_s
            ) as brokers,
        ):
            self.service = Service(
                self.settings,
                Sessions(self.identity.private, self.admitted, self.job.digest(), self.settings.max_sessions),
                Intake(
                    job=self.job,
                    width=checkpoint.config.hidden_size,
                    update_shapes=shapes,
                ),
                make_rounds(self.job, progress.round, place, progress.clients, sums, progress.bound()),
                Inference(self.job.cohort.max_batch_tokens),
                StreamBook(
                    StreamLimits(
                        self.settings.max_cached_tokens,
                        context_length(checkpoint.config),
                        self.settings.max_streams_per_session,
                        self.job.prefix_tokens,
                    )
                ),
                Engine(progress, waker.wake, self.settings.threads, replicas),
                brokers,
                waker,
                Welcome(
                    job=self.job.canonical().decode(),
                    config=fingerprint.config,
                    tensor_table=fingerprint.tensors,
                    weights=fingerprint.weights,
                ),
                CohortMetrics(self.registry),
                self.health,
                replicas,
            )
            self.registry.register(ServerMetrics(self.service))
            if not self._stop.is_set():
                self.service.run()

    def _sums(self, shapes: Shapes) -> AnySums | None:
        """Says how updates are masked, or why they are not. Raises JobError if there are too many values for it."""
        if self.job.secure == "off":
            if self.job.handed_in:
                event(logger, "updates_not_masked", level=logging.WARNING, reason=why_off(self.job))
            return None
        check_length(shapes)
        event(logger, "updates_masked", secure=self.job.secure, group_key=self.job.aggregation.group_key is not None)
        return (Rings if self.job.secure == "ring" else Sums)(self.job, shapes)

    def _load_trunk(self, checkpoint: Checkpoint, plan: SplitPlan) -> Trunk:
        dtype, device = TRUNK_DTYPES[self.job.training.trunk_dtype], device_of(self.settings)
        part = load_part(checkpoint, plan, "trunk", dtype=dtype, device=device)
        make_trainable(part, self.job)
        return Trunk(
            part,
            self.job,
            device,
            max_kept_tokens=self.settings.max_kept_tokens,
            piece_tokens=self.settings.piece_tokens,
        )

    @contextmanager
    def _replicas(self, place: Place | None, progress: Progress) -> Iterator[Replicas | None]:
        """The group of replicas, all at the round that the earliest of them has completed."""
        if place is None:
            yield None
            return
        replicas = Replicas(place, device_of(self.settings), self.settings.replica_timeout_s)
        try:
            earliest = replicas.earliest(progress.round)
            if earliest < progress.round:
                progress.restore(earliest)
            yield replicas
        finally:
            replicas.close()


def make_rounds(
    job: Job,
    round: int,
    place: Place | None = None,
    known: Iterable[str] = (),
    sums: AnySums | None = None,
    bound: frozenset[str] = frozenset(),
) -> Rounds:
    """The state machine of the job's kind of training; one of several replicas begins with its share of the clients.

    `known`: those from whom this round is drawn, where it is. `sums`, `bound`: as Rounds has them.
    """
    clients, quorum = job.cohort.clients, job.cohort.effective_quorum
    if place is not None and place.replicas > 1:
        clients = clients // place.replicas + (place.replica < clients % place.replicas)
        at_least = 0 if sums is None else least_quorum(clients)
        quorum = clients if quorum == job.cohort.clients else at_least
    plan = Plan(
        clients=clients,
        rounds=job.rounds.count,
        local_steps=job.rounds.local_steps,
        deadline_s=job.cohort.deadline_s,
        quorum=max(1, quorum),
        replicated=place is not None,
        never_idle=quorum >= clients > 0,
        places=job.cohort.clients if job.cohort.adapters == "per_client" else None if sums is None else MAX_CLIENTS,
        micro_batches=job.training.gradient_accumulation_steps,
        in_flight=job.cohort.in_flight,
        patience_s=job.cohort.patience_s,
        max_batch_tokens=job.cohort.max_batch_tokens,
        sampled=job.cohort.sampled,
        seed=job.training.seed,
        deadline_mads=job.cohort.deadline_mads,
    )
    if job.split.trunk == "client":
        return PlainFedavg(plan, round, known, sums, bound)
    kind = Lockstep if job.cohort.mode == "lockstep" else Greedy
    return kind(plan, round, known, sums, bound)
