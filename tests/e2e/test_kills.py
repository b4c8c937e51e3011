"""kill -9 of real processes under a supervisor: the run ends, and with the same bits as one that nobody disturbed."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks.chaos import NAMES, commands, disturbed, sites, trained
from benchmarks.fidelity import ALL, Case, make_job
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.cluster import Cluster
from launcher.supervisor import Supervisor
from shared.job import Job, Rounds

LIMIT_S = 240.0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = save_tiny_model("llama", tmp_path / "model")
    save_word_tokenizer(model)
    made = make_job(model, Case(ALL, len(NAMES)))
    return made.model_copy(update={"rounds": Rounds(count=6, local_steps=25, evaluate_every=6)})


def test_random_kills_change_nothing(job: Job, tmp_path: Path) -> None:
    rows = sites(tmp_path)
    local_run.train_together(job, rows, tmp_path / "calm")
    kills, lost = disturbed(job, rows, tmp_path / "chaos", seconds=20.0, seed=3)
    assert sum(kills.values()) > 0
    assert lost == 0
    calm, chaos = trained(tmp_path / "calm"), trained(tmp_path / "chaos")
    assert calm.keys() == chaos.keys()
    assert [name for name in calm if not torch.equal(calm[name], chaos[name])] == []


@pytest.mark.slow
def test_a_client_killed_when_all_is_done_still_gets_its_result(job: Job, tmp_path: Path) -> None:
    """The server waits for it, although the others have taken leave."""
    job = job.model_copy(update={"rounds": Rounds(count=1, local_steps=2)})
    rows = sites(tmp_path)
    out = tmp_path / "run"
    words = commands(job, rows, out)
    killed = False
    deadline = time.monotonic() + LIMIT_S
    with Cluster(out / "logs", local_run.THREADS) as cluster:
        supervisor = Supervisor(cluster, words, lambda line: None)
        while not supervisor.done and time.monotonic() < deadline:
            for role, event in cluster.events(0.05):
                if role.name == NAMES[0] and event.get("event") == "step" and event["step"] == 1 and not killed:
                    killed = supervisor.kill(NAMES[0])
            supervisor.turn()
        assert supervisor.done
    assert killed
    assert (out / "results" / NAMES[0] / "flglm.json").exists()
