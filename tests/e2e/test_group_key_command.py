"""A group's key on the command line, every role a process: made, refused where it does not fit, trained with."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.chaos import NAMES, sites
from benchmarks.fidelity import ALL, Case, make_job
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.cluster import Cluster
from shared import state_files
from shared.group_keys import create_group_key
from shared.job import FedAvg, Rounds
from worker_server.box import SEALED

LIMIT_S = 300.0


def flglm(*words: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and what it says to machines."""
    command = [sys.executable, "-m", "launcher.main", *words, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, said


def test_a_job_whose_server_sees_neither_sums_nor_averages(tmp_path: Path) -> None:
    code, said = flglm("keys", "group", "--out", str(tmp_path / "group.key"))
    assert code == 0
    model = save_tiny_model("llama", tmp_path / "model")
    save_word_tokenizer(model)
    job = make_job(model, Case(ALL, len(NAMES))).model_copy(
        update={
            "rounds": Rounds(count=2, local_steps=2, evaluate_every=2),
            "aggregation": FedAvg(group_key=said["data"]["fingerprint"]),
        }
    )
    create_group_key(tmp_path / "other.key")
    rows, out = sites(tmp_path), tmp_path / "run"
    local_run.prepare(job, rows, out)
    with Cluster(out / "logs", local_run.THREADS) as cluster:
        addresses = local_run.start_broker(cluster, out)
        local_run.start_servers(cluster, out, addresses["servers"], 1)
        words = {site.name: local_run.client_words(out, job, site, addresses["clients"]) for site in rows}
        code, said = flglm(*words[NAMES[0]], "--group-key", str(tmp_path / "other.key"))
        assert (code, said["error_code"]) == (4, "key_file")
        assert "another group's key: its fingerprint is" in said["message"]
        clients = [
            cluster.start("client", name, [*words[name], "--group-key", str(tmp_path / "group.key")]) for name in NAMES
        ]
        deadline = time.monotonic() + LIMIT_S
        while any(role.exit_code is None for role in clients):
            assert time.monotonic() < deadline
            for _ in cluster.events(0.2):
                pass
            cluster.check()
    trained = [load_file(out / "results" / name / "trained.safetensors") for name in NAMES]
    assert all(torch.equal(trained[0][key], other[key]) for other in trained[1:] for key in trained[0])
    tensors, _ = state_files.load(out / "server-state", 2)
    assert f"{SEALED}2" in tensors
    assert not any(name.startswith("average/") for name in tensors)
