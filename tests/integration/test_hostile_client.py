"""A few thousand of the messages of benchmarks.fuzz, which sends a million."""

from pathlib import Path

import torch

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.fuzz import attack
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Site, train_in_process, trunk_tensors
from shared.job import Rounds


def test_mutated_messages_are_refused_by_kind_and_disturb_nobody(tmp_path: Path) -> None:
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 1))
    job = job.model_copy(update={"rounds": Rounds(count=2, local_steps=3)})
    train_in_process(job, {"honest": Site(random_rows(8, 0))}, tmp_path / "calm")
    _, refused, _ = attack(job, tmp_path / "attacked", 4000, seed=1)
    codes = {code for code, count in refused.items() if code.startswith("refused_") and count}
    assert codes >= {"refused_frame", "refused_envelope", "refused_order", "refused_schema"}
    calm, attacked = trunk_tensors(tmp_path / "calm"), trunk_tensors(tmp_path / "attacked")
    assert all(torch.equal(calm[name], attacked[name]) for name in calm)
