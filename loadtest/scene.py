"""The stage of a load test: a random model, a job, keys for everyone, and the words that start each process."""

import resource
from datetime import UTC, datetime
from pathlib import Path

import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from launcher.local_run import broker_words, free_port, server_words
from loadtest.crowd import member_name
from loadtest.plan import Plan
from shared.allow_list import admit
from shared.errors import UsageError
from shared.identity import create_identity
from shared.job import Job, parse_job

# Under greedy cohorts whoever is there is served; a round goes on without those who left.
ROUNDS = 1_000_000
FILES_A_MEMBER = 6
# What the broker allows an admitted client; whoever is put out again and again uses it.
PEERS_OF_ONE = 16


def make_scene(plan: Plan, folder: Path, model: str | None) -> Job:
    """Model (unless one is given), job, keys and admissions under `folder`. Raises UsageError."""
    check_open_files(plan)
    if model is None:
        model = str(_random_model(plan, folder / "model"))
    job = make_job(plan, model)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))
    now, keys = datetime.now(UTC), folder / "keys"
    for name in ("broker", "server"):
        create_identity(keys, name)
    admit(keys / "server.card", folder / "servers", now)
    # Not through `admit`, which compares each card with all others: these are new.
    clients = folder / "clients"
    clients.mkdir()
    for index in range(plan.clients):
        name = member_name(index)
        create_identity(keys, name)
        (keys / f"{name}.card").rename(clients / f"{name}.card")
    return job


def make_job(plan: Plan, model: str) -> Job:
    """LoRA in the trunk alone, so that rounds end without tensors."""
    together = max(1, round(0.95 * plan.trainers))
    return parse_job(
        {
            "name": "loadtest",
            "model_name_or_path": model,
            "training": {
                "parts": ["trunk"],
                "learning_rate": 1e-6,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": plan.rows,
            },
            "data": {"max_length": max(2, plan.longest)},
            "rounds": {"count": ROUNDS, "local_steps": plan.local_steps},
            "cohort": {"mode": "greedy", "clients": together, "quorum": 1, "deadline_s": 30.0, "patience_s": 0.25},
        },
        "the load test's job",
    )


def check_open_files(plan: Plan) -> None:
    """Every connection is an open file at the broker, and some in the crowd. Raises UsageError if there are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_A_MEMBER * plan.clients + 256
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UsageError(
            f"{plan.clients} clients need {needed} open files a process, allowed are {hard}",
            hint=f"ulimit -Hn {needed}, or fewer --clients",
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))  # processes started from here inherit it


def words(plan: Plan, folder: Path, server_threads: int) -> dict[str, list[str]]:
    """The commands of broker and server, with addresses where both can be watched."""
    clients, servers = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    broker = [
        *broker_words(folder, clients, servers),
        "--max-peers",
        str(plan.clients + PEERS_OF_ONE * plan.hostile + 64),
    ]
    server = [*server_words(folder, servers, server_threads), "--max-sessions", str(2 * plan.clients + 64)]
    return {"broker": broker, "server": server}


def crowd_words(plan_file: Path, folder: Path, broker: str, first: int) -> list[str]:
    return [
        "loadtest-crowd", "--plan", str(plan_file), "--scene", str(folder), "--broker", broker, "--first", str(first)
    ]  # fmt: skip


def _random_model(plan: Plan, folder: Path) -> Path:
    """Three blocks: one in the head, one in the trunk, one in the tail."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=plan.hidden_size, intermediate_size=2 * plan.hidden_size, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=max(64, plan.longest),
    )  # fmt: skip
    disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
