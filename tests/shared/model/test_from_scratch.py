"""Weights drawn part by part are the whole model's, as each family would begin, and nothing is read for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import VOCABULARY, save_tiny_model
from launcher.in_process import Background
from launcher.whole_models import drawn_whole
from shared.errors import JobError, ModelError
from shared.job import Full, Job, Training, parse_job
from shared.model.carve import Part, load_head_and_tail, load_part
from shared.model.checkpoint import SINGLE, checkpoint_of
from shared.model.families import FAMILIES
from shared.model.plan import SplitPlan

ROWS = [[5, 9, 2, 44], [7, 8]]


def job_of(family: str, folder: Path, seed: int = 3, **changes: Any) -> Job:
    """Of a folder with a configuration and no weights."""
    save_tiny_model(family, folder, **changes)
    (folder / SINGLE).unlink()
    return Job(model_name_or_path=str(folder), method=Full(), training=Training(from_scratch=True, seed=seed))


def parts_of(job: Job) -> tuple[Part, Part, Part]:
    checkpoint, plan = checkpoint_of(job), SplitPlan(1, 1, 4)
    head, tail = load_head_and_tail(checkpoint, plan)
    return head, load_part(checkpoint, plan, "trunk"), tail


def weights_of(parts: tuple[Part, Part, Part]) -> dict[str, Tensor]:
    return {name: p.detach() for part in reversed(parts) for name, p in part.named_parameters().items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_parts_draw_what_the_whole_model_would(family: str, tied: bool, tmp_path: Path) -> None:
    job = job_of(family, tmp_path, tied=tied)
    parts = head, trunk, tail = parts_of(job)
    whole = drawn_whole(job).eval()
    expected = dict(whole.named_parameters(remove_duplicate=False))
    mine = weights_of(parts)
    assert mine.keys() == expected.keys()
    assert [name for name, value in mine.items() if not torch.equal(value, expected[name])] == []
    for part in parts:
        part.module.eval()
    lengths = [len(row) for row in ROWS]
    hidden = trunk.forward(head.embed(torch.tensor([token for row in ROWS for token in row]), lengths), lengths)
    logits = tail.logits(hidden, lengths, torch.arange(sum(lengths)))
    rows = torch.cat([whole(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
    torch.testing.assert_close(logits, rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_values_are_spread_as_transformers_would(family: str, tmp_path: Path) -> None:
    job = job_of(family, tmp_path)
    theirs = AutoModelForCausalLM.from_config(checkpoint_of(job).config)
    mine = weights_of(parts_of(job))
    for name, parameter in theirs.named_parameters():
        value = parameter.detach()
        if value.std() > 0:
            assert float(mine[name].std()) == pytest.approx(float(value.std()), rel=0.15), name
            assert not torch.equal(mine[name], value)
        else:
            assert torch.equal(mine[name], value), name


def test_a_draw_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    one = job_of("llama", tmp_path / "one")
    torch.manual_seed(1)
    first = weights_of(parts_of(one))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = weights_of(parts_of(one))
    other = weights_of(parts_of(job_of("llama", tmp_path / "two", seed=4)))
    assert torch.equal(before, torch.get_rng_state())
    drawn = [name for name in first if "norm" not in name]
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in drawn)
    assert len({float(first[name].flatten()[0]) for name in drawn}) == len(drawn)
    assert first["model.embed_tokens.weight"].shape == (VOCABULARY, 32)


def test_draws_in_several_threads_disturb_nobody(tmp_path: Path) -> None:
    """transformers replaces torch's functions for all threads while it builds a model."""
    job = job_of("llama", tmp_path)
    expected = weights_of(parts_of(job))
    found: list[dict[str, Tensor]] = []
    threads = [
        Background(str(number), lambda: found.extend(weights_of(parts_of(job)) for _ in range(4)))
        for number in range(3)
    ]
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for weights in found:
        assert [name for name, value in weights.items() if not torch.equal(value, expected[name])] == []


def test_fingerprints_cover_configuration_and_seed(tmp_path: Path) -> None:
    one = checkpoint_of(job_of("llama", tmp_path / "one")).fingerprint()
    assert one.difference(checkpoint_of(job_of("llama", tmp_path / "two")).fingerprint()) is None
    other = checkpoint_of(job_of("llama", tmp_path / "three", seed=4)).fingerprint()
    assert one.difference(other) == "the weights differ"
    wider = checkpoint_of(job_of("llama", tmp_path / "four", rms_norm_eps=1e-3)).fingerprint()
    assert one.difference(wider) == "the configurations differ (config.json)"


def test_without_the_setting_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    job = job_of("llama", tmp_path)
    with pytest.raises(ModelError, match=r"no model\.safetensors") as error:
        checkpoint_of(job.model_copy(update={"training": Training()}))
    assert "training.from_scratch=true" in (error.value.hint or "")


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"type": "lora"}},
        {"method": {"type": "prompt"}, "training": {"from_scratch": True, "parts": ["head"]}},
        {"training": {"from_scratch": True, "parts": ["head", "tail"]}},
        {"training": {"from_scratch": True, "trunk_dtype": "bfloat16"}},
    ],
)
def test_what_would_leave_random_weights_untrained_is_refused(change: dict[str, Any]) -> None:
    values = {"model_name_or_path": "m", "method": {"type": "full"}, "training": {"from_scratch": True}}
    parse_job(values, "job.yaml")
    with pytest.raises(JobError, match=r"training\.(from_scratch=true begins|trunk_dtype=bfloat16)"):
        parse_job(values | change, "job.yaml")
