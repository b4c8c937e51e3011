"""The compute thread: works in order, an outcome each, and an error of its own reaches whoever collects."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.tiny_models import save_tiny_model
from shared.errors import CheckpointError
from shared.job import Full, Job
from shared.model.carve import load_part
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable
from worker_server.engine import Computed, Engine
from worker_server.kept import Rows
from worker_server.progress import Progress
from worker_server.trunk import Trunk
from worker_server.work import Aggregate, Restore, RunBackward, RunEvaluation, RunForward, Ticket, Work

WAIT_S = 60.0
WIDTH = 32


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    model = save_tiny_model("llama", tmp_path / "model")
    job = Job(model_name_or_path=str(model), method=Full())
    part = load_part(Checkpoint(str(model)), SplitPlan(1, 1, 4), "trunk")
    make_trainable(part, job)
    progress = Progress(
        tmp_path / "state",
        job,
        Checkpoint(str(model)).fingerprint(),
        Trunk(part, job),
        initial=lambda: {"x": torch.zeros(2)},
    )
    progress.begin()
    return progress


class Running:
    """An engine and its wake-ups."""

    def __init__(self, progress: Progress) -> None:
        self.woken: queue.Queue[None] = queue.Queue()
        self.engine = Engine(progress, lambda: self.woken.put(None))

    def collect(self, count: int) -> list[Computed]:
        """After `count` more wake-ups."""
        for _ in range(count):
            self.woken.get(timeout=WAIT_S)
        return self.engine.collect()


@contextmanager
def running(progress: Progress) -> Iterator[Running]:
    made = Running(progress)
    made.engine.start()
    yield made
    made.engine.stop(WAIT_S)
    assert not made.engine.thread.is_alive()


def rows(count: int, seed: int = 0) -> Rows:
    return Rows(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), (count,), count - 1, True)


def ticket(name: str, payload: object, weight: int = 1) -> Ticket:
    return Ticket(name.encode() * 16, name, 1, payload, weight=weight)


def test_a_round_of_works_in_order(progress: Progress) -> None:
    a, b = ticket("a", rows(3)), ticket("b", rows(5))
    gradient = ticket("b", torch.ones(5, WIDTH))
    works: list[Work] = [
        RunForward(0, (a, b)),
        RunEvaluation((b,)),
        RunBackward(0, (a, b), {b.session: gradient}),
        Aggregate(0, (ticket("a", {"x": torch.zeros(2)}), ticket("b", {"x": torch.ones(2)}, weight=3))),
    ]
    with running(progress) as made:
        for work in works:
            made.engine.submit(work)
        outcomes = made.collect(len(works))
    assert [outcome.work for outcome in outcomes] == works
    forward, evaluation, backward, aggregation = outcomes
    assert [t.client for t, _ in forward.answers] == ["a", "b"]
    assert [t.client for t, _ in evaluation.answers] == ["b"]
    torch.testing.assert_close(evaluation.answers[0][1], forward.answers[1][1])
    # Who sent no gradient gets no answer.
    assert [t for t, _ in backward.answers] == [gradient]
    assert backward.answers[0][1] is not None
    assert aggregation.answers == ()
    assert progress.round == 1
    assert progress.averages is not None
    assert torch.equal(progress.averages["x"], torch.full((2,), 0.75))


def test_an_undone_round_leaves_no_trace(progress: Progress) -> None:
    before = {name: value.clone() for name, value in progress.trunk.state().items()}
    a = ticket("a", rows(3))
    with running(progress) as made:
        made.engine.submit(RunForward(0, (a,)))
        made.engine.submit(RunBackward(0, (a,), {a.session: ticket("a", torch.ones(3, WIDTH))}))
        made.collect(2)
        assert progress.trunk.state().keys() > before.keys()
        made.engine.submit(Restore(0))
        made.collect(1)
    after = progress.trunk.state()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_an_error_reaches_whoever_collects_and_ends_the_work(progress: Progress) -> None:
    with running(progress) as made:
        made.engine.submit(Restore(7))
        with pytest.raises(CheckpointError, match="checkpoint-7"):
            made.collect(1)
        made.engine.thread.join(WAIT_S)
        assert not made.engine.thread.is_alive()
        assert made.engine.collect() == []


def test_stopping_ends_what_was_submitted_first(progress: Progress) -> None:
    with running(progress) as made:
        for seed in range(3):
            made.engine.submit(RunEvaluation((ticket("a", rows(4, seed)),)))
    assert len(made.engine.collect()) == 3
