"""Clients generate at the same time through broker and server, sealed: each what transformers generates alone."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fidelity import Case, make_job
from benchmarks.plain import load_plain
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Serving, serving
from launcher.whole_models import with_method
from shared.errors import Refused
from shared.job import Cohort, Job, Lora, Prefix, Training
from shared.model.checkpoint import Checkpoint
from shared.model.families import FAMILIES
from worker_client.generation import generate
from worker_client.head_tail import load_client_parts
from worker_client.remote_trunk import RemoteTrunk

WAIT_S = 60.0
PROMPTS = {"a": [[5, 9, 2, 44], [7]], "b": [[3, 8, 60, 61, 62, 12]], "c": [[50, 51], [52, 53, 54], [55]]}
NEW_TOKENS = 10


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(save_tiny_model("llama", tmp_path / "model"), Case(("trunk",), 3))


def run(running: Serving, name: str, prompts: list[list[int]], **settings: float) -> list[list[int]]:
    parts = load_client_parts(Checkpoint(running.job.model_name_or_path), running.job)
    with running.link(name) as link:
        return generate(
            parts,
            RemoteTrunk(link, running.job, WAIT_S),
            prompts,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=1,
            **settings,  # type: ignore[arg-type]
        )


def all_streams_are_given_back(running: Serving) -> bool:
    """Nobody answers a Release: it is seen by looking, for a while."""
    service = running.running.service
    assert service is not None
    deadline = time.monotonic() + WAIT_S
    while service.streams.lengths and time.monotonic() < deadline:
        time.sleep(0.01)
    return not service.streams.lengths


@torch.no_grad()
def expected(model: str, prompt: list[int]) -> list[int]:
    output = load_plain(model).generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=1, pad_token_id=0
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("adapters", ["shared", "per_client"])
def test_clients_generate_together_what_transformers_does(job: Job, adapters: str, tmp_path: Path) -> None:
    if adapters == "per_client":
        cohort = Cohort(clients=3, adapters="per_client")
        job = job.model_copy(update={"method": Lora(), "cohort": cohort})
    results: dict[str, list[list[int]]] = {}
    with serving(job, tmp_path, list(PROMPTS)) as running:

        def one(name: str) -> None:
            results[name] = run(running, name, PROMPTS[name])

        threads = [Background(name, lambda name=name: one(name)) for name in PROMPTS]
        for thread in threads:
            thread.join()
        assert all_streams_are_given_back(running)
    for name, prompts in PROMPTS.items():
        assert results[name] == [expected(job.model_name_or_path, prompt) for prompt in prompts]


@pytest.mark.parametrize("adapters", ["shared", "per_client"])
@torch.no_grad()
def test_prefixes_are_there_when_clients_generate(job: Job, adapters: Any, tmp_path: Path) -> None:
    """What peft's model writes, whose prefix is in every layer."""
    cohort = Cohort(clients=3, adapters=adapters)
    job = job.model_copy(update={"method": Prefix(num_virtual_tokens=4), "cohort": cohort, "training": Training()})
    results: dict[str, list[list[int]]] = {}
    with serving(job, tmp_path, list(PROMPTS)) as running:
        threads = [
            Background(name, lambda n=name: results.update({n: run(running, n, PROMPTS[n])})) for name in PROMPTS
        ]
        for thread in threads:
            thread.join()
        assert all_streams_are_given_back(running)
    model, _ = with_method(load_plain(job.model_name_or_path), job, FAMILIES["llama"])
    for name, prompts in PROMPTS.items():
        for prompt, written in zip(prompts, results[name], strict=True):
            row = list(prompt)
            while len(row) < len(prompt) + NEW_TOKENS and row[-1:] != [1]:
                row.append(int(model.eval()(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
            assert written == row[len(prompt) :]


def test_sampling_follows_its_seed(job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"]) as running:
        first, again, other = (run(running, "a", PROMPTS["a"], temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_row_longer_than_the_model_knows_is_refused_and_its_stream_is_given_back(job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"]) as running:
        with pytest.raises(Refused) as refused:
            run(running, "a", [list(range(2, 62))])
        assert refused.value.reason == "too_long"
        assert run(running, "a", PROMPTS["a"])
        assert all_streams_are_given_back(running)


def test_no_room_is_said_and_leaves_the_others_alone(job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"], max_cached_tokens=12) as running:
        with pytest.raises(Refused) as refused:
            run(running, "a", PROMPTS["a"])
        assert refused.value.reason == "no_cache_room"
        assert len(run(running, "a", [[7]])[0]) == NEW_TOKENS


def test_an_empty_prompt_is_an_error(job: Job, tmp_path: Path) -> None:
    with serving(job, tmp_path, ["a"]) as running, pytest.raises(ValueError, match="at least one token"):
        run(running, "a", [[3], []])
