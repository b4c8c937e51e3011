"""Methods with virtual tokens, cut in three, against peft on the whole model: logits, gradients, generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.plain import load_plain
from benchmarks.tiny_models import VOCABULARY, save_tiny_model
from launcher.whole_models import with_method
from shared.errors import JobError
from shared.job import Job, Method, Prefix, Prompt, Training, parse_job
from shared.model.carve import Part, load_head_and_tail, load_part
from shared.model.checkpoint import Checkpoint
from shared.model.families import FAMILIES
from shared.model.kv_cache import RowCache
from shared.model.methods import longest_row
from shared.model.plan import SplitPlan
from shared.model.trainable import make_trainable, trained, update_shapes
from worker_client.batches import pack_rows
from worker_client.data import Row

LENGTHS = [9, 1, 14, 3]
VIRTUAL = 5
NEW_TOKENS = 4
PROMPT = (Prompt(num_virtual_tokens=VIRTUAL), ("head",))
PREFIX = (Prefix(num_virtual_tokens=VIRTUAL), ("head", "trunk", "tail"))
# More than the windows of 6 tokens that some families have.
LONG_PREFIX = (Prefix(num_virtual_tokens=8), ("head", "trunk", "tail"))
METHODS = pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=["prompt", "prefix"])


def job_of(folder: Path, method: Method, parts: Any) -> Job:
    return Job(model_name_or_path=str(folder), method=method, training=Training(parts=parts, seed=7))


def parts_of(job: Job) -> tuple[Part, Part, Part]:
    checkpoint = Checkpoint(job.model_name_or_path)
    plan = SplitPlan(1, 1, checkpoint.config.num_hidden_layers)
    head, tail = load_head_and_tail(checkpoint, plan)
    parts = head, load_part(checkpoint, plan, "trunk"), tail
    for part in parts:
        make_trainable(part, job)
        part.module.eval()
    return parts


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def split_logits(parts: tuple[Part, Part, Part], job: Job) -> Tensor:
    """Of the rows' own tokens, (T, vocabulary)."""
    head, trunk, tail = parts
    batch = pack_rows([Row(tuple(row), (True,) * len(row)) for row in rows()], job.prompt_tokens)
    hidden = trunk.forward(head.embed(batch.input_ids, batch.lengths), batch.lengths)
    return tail.logits(hidden, batch.lengths, (batch.input_ids >= 0).nonzero().flatten())


def whole_logits(model: Any) -> Tensor:
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0, -len(row) :] for row in rows()])


def whole(job: Job) -> tuple[Any, dict[str, nn.Parameter]]:
    plain = load_plain(job.model_name_or_path)
    model, parameters = with_method(plain, job, FAMILIES[plain.config.model_type])
    return model.eval(), parameters


@pytest.mark.parametrize("method", [PROMPT, PREFIX, LONG_PREFIX], ids=["prompt", "prefix", "long prefix"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_split_model_is_pefts(family: str, method: Any, tmp_path: Path) -> None:
    job = job_of(save_tiny_model(family, tmp_path), *method)
    parts = parts_of(job)
    mine = trained(parts)
    model, theirs = whole(job)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    logits, expected = split_logits(parts, job), whole_logits(model)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.autograd.backward(logits.square().mean())
    torch.autograd.backward(expected.square().mean())
    for name, parameter in mine.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)


@METHODS
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@torch.no_grad()
def test_rows_go_on_with_caches_as_without(family: str, method: Any, tmp_path: Path) -> None:
    job = job_of(save_tiny_model(family, tmp_path), *method)
    head, trunk, tail = parts_of(job)
    model, _ = whole(job)
    caches = [[RowCache() for _ in LENGTHS] for _ in range(3)]
    written = rows()
    new = [list(batch) for batch in torch.split(pack_ids(written, job), [job.prompt_tokens + n for n in LENGTHS])]
    for _ in range(NEW_TOKENS):
        lengths = [len(row) for row in new]
        ids = torch.tensor([int(token) for row in new for token in row])
        hidden = trunk.forward(head.embed(ids, lengths, caches=caches[0]), lengths, caches=caches[1])
        logits = tail.logits(hidden, lengths, torch.tensor(lengths).cumsum(0) - 1, caches[2])
        for row, mine in zip(written, logits, strict=True):
            expected = model(input_ids=torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        new = [[token] for token in logits.argmax(-1)]
        for row, (token,) in zip(written, new, strict=True):
            row.append(int(token))


def pack_ids(texts: list[list[int]], job: Job) -> Tensor:
    return pack_rows([Row(tuple(row), (True,) * len(row)) for row in texts], job.prompt_tokens).input_ids


@METHODS
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo"])
def test_the_server_knows_what_an_update_must_hold(family: str, method: Any, tmp_path: Path) -> None:
    job = job_of(save_tiny_model(family, tmp_path, tied=True), *method)
    head, _, tail = parts_of(job)
    shapes = {name: tuple(p.shape) for name, p in trained([head, tail]).items()}
    assert update_shapes(Checkpoint(job.model_name_or_path).config, head.plan, job) == shapes
    assert len(shapes) == (1 if job.prompt_tokens else 4)


@METHODS
def test_another_seed_begins_elsewhere(method: Any, tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path), *method)
    first, again = trained(parts_of(job)), trained(parts_of(job))
    other = trained(parts_of(job.model_copy(update={"training": Training(parts=method[1], seed=8)})))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])


@pytest.mark.parametrize("virtual", [0, 3])
def test_targets_lie_behind_the_virtual_tokens(virtual: int) -> None:
    batch = pack_rows([Row((5, 6, 7), (False, False, True)), Row((8, 9), (True, True))], virtual)
    before = [*range(-1, -1 - virtual, -1)]
    assert batch.input_ids.tolist() == [*before, 5, 6, 7, *before, 8, 9]
    assert batch.lengths == (virtual + 3, virtual + 2)
    assert batch.at.tolist() == [virtual + 1, 2 * virtual + 3]
    assert batch.targets.tolist() == [7, 9]


PROMPT_JOB = {
    "model_name_or_path": "m",
    "method": {"type": "prompt", "num_virtual_tokens": 20},
    "training": {"parts": ["head"]},
    "data": {"max_length": 32},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {}}, r"training\.parts=\['head', 'trunk', 'tail'\] must be \[head\]"),
        ({"training": {"parts": ["trunk"]}}, r"training\.parts=\['trunk'\] must be \[head\]"),
        ({"cohort": {"adapters": "per_client"}}, r"cohort\.adapters=per_client needs method\.type=lora or prefix"),
        ({"data": {"max_length": 21}}, r"method\.num_virtual_tokens=20 leaves no room for rows in data\.max_length=21"),
    ],
)
def test_a_job_that_contradicts_itself_is_refused(change: dict[str, Any], said: str) -> None:
    parse_job(PROMPT_JOB, "job.yaml")
    with pytest.raises(JobError, match=said):
        parse_job(PROMPT_JOB | change, "job.yaml")


def test_rows_are_cut_where_virtual_tokens_need_the_room() -> None:
    job = parse_job(PROMPT_JOB, "job.yaml")
    assert longest_row(job, 64) == 12
    assert longest_row(job, 22) == 2
    with pytest.raises(JobError, match=r"method\.num_virtual_tokens=20 leaves no room.*context is 21 tokens"):
        longest_row(job, 21)


def test_layers_begin_with_values_of_their_own(tmp_path: Path) -> None:
    values = list(trained(parts_of(job_of(save_tiny_model("llama", tmp_path), *PREFIX))).values())
    assert len(values) == 8
    assert len({float(value.detach()[0, 0, 0]) for value in values}) == 8
    assert torch.cat([value.detach().flatten() for value in values]).std() == pytest.approx(1, abs=0.1)


def test_parts_that_are_not_trained_have_no_prefix_but_the_same_positions(tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path), PREFIX[0], ("trunk",))
    parts = parts_of(job)
    assert {name.split(".")[2] for name in trained(parts)} == {"1", "2"}
    assert [part.first_position for part in parts] == [VIRTUAL] * 3


def test_a_prefix_takes_positions_and_no_tokens() -> None:
    values = {"model_name_or_path": "m", "method": {"type": "prefix"}, "data": {"max_length": 24}}
    job = parse_job(values, "job.yaml")
    assert (longest_row(job, 64), longest_row(job, 50), longest_row(job, 32)) == (24, 20, 2)
    with pytest.raises(JobError, match=r"method\.num_virtual_tokens=30 leaves no room.*context is 31 tokens"):
        longest_row(job, 31)


def test_a_projection_is_refused_with_the_reason() -> None:
    method = {"type": "prefix", "prefix_projection": True}
    with pytest.raises(JobError, match=r"prefix_projection=true.*client and server cannot share"):
        parse_job({"model_name_or_path": "m", "method": method}, "job.yaml")
