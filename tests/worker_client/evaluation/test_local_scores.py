"""Scores of the local model equal those of plain transformers; what a job trained scores as it did in the job."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher.in_process import Outcome, Site, train_in_process
from shared.errors import CheckpointError, DataError, FlglmError, ModelError, UsageError
from shared.job import Full, Job, Lora
from worker_client.batches import Batch
from worker_client.client import _write_result
from worker_client.data import Row
from worker_client.evaluation import scoring
from worker_client.evaluation.cases import Example
from worker_client.evaluation.local_model import LocalModel, Trained, load_local_model
from worker_client.evaluation.scoring import choose, likelihoods, option_row
from worker_client.evaluation.summaries import continuation, rouge


def close(values: list[float]) -> Any:
    return pytest.approx(values, abs=1e-4, rel=1e-5)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gpt_neo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes 64 tokens; word w<i> is token i, token 1 is the end."""
    made = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    save_word_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> LocalModel:
    return load_local_model(str(folder))


def plain(folder: Path) -> tuple[Any, Any]:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return whole, AutoTokenizer.from_pretrained(folder)


def words(seed: int, count: int) -> str:
    drawn = torch.randint(20, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{number}" for number in drawn)


def test_options_score_as_a_few_lines_of_transformers_say(folder: Path, model: LocalModel) -> None:
    """Summed and per token: both choices are those of the plain model, and they are not always the same one."""
    whole, tokenizer = plain(folder)
    differ = 0
    for seed in range(30):
        prompt = words(seed, 5)
        options = {str(n): " " + words(100 * seed + n, n) for n in (1, 2, 3)}
        sums, means = {}, {}
        for name, option in options.items():
            begin, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + option, return_tensors="pt").input_ids
            with torch.no_grad():
                scores = whole(input_ids=ids).logits[0].log_softmax(-1)
            terms = [float(scores[at - 1, ids[0, at]]) for at in range(begin, ids.shape[1])]
            sums[name], means[name] = sum(terms), sum(terms) / len(terms)
        rows = [option_row(model.tokenizer, prompt, option, 64)[0] for option in options.values()]
        found = likelihoods(model.logits, rows)
        assert [each.log_probability for each in found] == close(list(sums.values()))
        assert [each.tokens for each in found] == [1, 2, 3]
        example = Example(prompt, options, ("1",))
        (by_sum,) = choose(model.logits, model.tokenizer, [example], context=64, per_token=False)
        (by_mean,) = choose(model.logits, model.tokenizer, [example], context=64, per_token=True)
        assert by_sum.name == max(sums, key=lambda name: sums[name])
        assert by_mean.name == max(means, key=lambda name: means[name])
        differ += by_sum.name != by_mean.name
    assert differ > 0


def test_loss_and_greedy_rows_are_those_of_transformers(folder: Path, model: LocalModel) -> None:
    whole, _ = plain(folder)
    rows = [*random_rows(6, 3), Row((7,), (True,))]
    with torch.no_grad():
        best = int(whole(input_ids=torch.tensor([[30, 31]])).logits[0, -1].argmax())
    rows.append(Row((30, 31, best), (False, False, True)))
    found = likelihoods(model.logits, rows)
    for row, each in zip(rows, found, strict=True):
        at = [place for place in range(1, len(row.input_ids)) if row.counts[place]]
        with torch.no_grad():
            logits = whole(input_ids=torch.tensor([row.input_ids])).logits[0]
        targets = torch.tensor([row.input_ids[place] for place in at], dtype=torch.int64)
        scores = logits[[place - 1 for place in at]]
        assert [-each.log_probability] == close([float(F.cross_entropy(scores, targets, reduction="sum"))])
        assert each.tokens == len(at)
        assert each.greedy == bool((scores.argmax(-1) == targets).all())
    assert found[-1].greedy


def test_greedy_continuations_are_those_of_generate(folder: Path, model: LocalModel) -> None:
    whole, tokenizer = plain(folder)
    for seed in range(3):
        ids = tokenizer(words(seed, 6), return_tensors="pt").input_ids
        expected = whole.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, use_cache=False, pad_token_id=1
        )[0, ids.shape[1] :]
        made, cut = continuation(model, words(seed, 6), 8, 64)
        assert made == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert not cut
    _, cut = continuation(model, words(9, 60), 8, 64)
    assert cut


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    save_word_tokenizer(made)
    return made


def test_batches_do_not_change_scores(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_local_model(str(llama))
    rows = random_rows(9, 1)
    together = likelihoods(model.logits, rows)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 10)
    assert [len(chunk) for chunk in scoring.in_batches([Row((n,) * 7, (True,) * 7) for n in range(3)])] == [1, 1, 1]
    assert [len(chunk) for chunk in scoring.in_batches([Row((n,) * 6, (True,) * 6) for n in range(3)])] == [2, 1]
    apart = likelihoods(model.logits, rows)
    assert [each.log_probability for each in apart] == close([each.log_probability for each in together])


def test_options_of_one_token_are_scored_in_one_forward_of_their_prompt(llama: Path) -> None:
    model = load_local_model(str(llama))
    computed: list[tuple[int, ...]] = []

    def counted(batch: Batch) -> torch.Tensor:
        computed.append(batch.lengths)
        return model.logits(batch)

    rows = [Row((30, 31, token), (False, False, True)) for token in (40, 41, 42)]
    rows.append(Row((30, 31, 40, 41), (False, False, True, True)))
    together = likelihoods(counted, rows)
    assert computed == [(2, 3)]
    apart = [likelihoods(model.logits, [row])[0] for row in rows]
    assert [each.log_probability for each in together] == close([each.log_probability for each in apart])
    assert len({each.log_probability for each in together}) == 4
    assert likelihoods(counted, [Row((30,), (True,))])[0].tokens == 0
    assert len(computed) == 1


def test_many_examples_are_answered_as_one_by_one(llama: Path) -> None:
    model = load_local_model(str(llama))
    asked = [
        Example(words(seed, 4), {str(n): " " + words(seed + n, 1 + n % 3) for n in range(2 + seed % 3)}, ("1",))
        for seed in range(20)
    ]
    together = choose(model.logits, model.tokenizer, asked, context=64, per_token=False)
    assert together == [
        choose(model.logits, model.tokenizer, [example], context=64, per_token=False)[0] for example in asked
    ]
    assert len({choice.name for choice in together}) > 1


def test_an_option_counts_from_where_the_text_is_no_longer_the_prompts(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert option_row(tokenizer, "w20 w21", " w22 w23", 64) == (
        Row((20, 21, 22, 23), (False, False, True, True)),
        False,
    )
    # Grown together with its last word: w2 and 2 are w22.
    assert option_row(tokenizer, "w20 w2", "2", 64) == (Row((20, 22), (False, True)), False)
    # The beginning goes where it is too long.
    assert option_row(tokenizer, "w20 w21 w22", " w23", 3) == (Row((21, 22, 23), (False, False, True)), True)


def test_an_option_without_a_token_and_scores_that_are_no_numbers_are_errors(llama: Path) -> None:
    model = load_local_model(str(llama))
    with pytest.raises(DataError, match="no token"):
        choose(model.logits, model.tokenizer, [Example("w20", {"a": ""}, ("a",))], context=64, per_token=False)

    def broken(batch: Batch) -> torch.Tensor:
        return torch.full((len(batch.at), 97), float("nan"))

    with pytest.raises(ModelError, match="not finite"):
        likelihoods(broken, random_rows(1, 0))


# What a job trained


def job_of(folder: Path, method: str) -> Job:
    job = make_job(folder, Case(ALL, 2))
    changes: dict[str, Any] = {"rounds": job.rounds.model_copy(update={"count": 2, "local_steps": 3})}
    changes["method"] = Full() if method == "full" else Lora(r=4, lora_alpha=64)
    if method == "tail":
        changes["training"] = job.training.model_copy(update={"parts": ("tail",)})
    elif method == "per_client":
        changes["cohort"] = job.cohort.model_copy(update={"adapters": "per_client"})
    return job.model_copy(update=changes)


def trained(job: Job, folder: Path) -> tuple[dict[str, Outcome], Trained]:
    sites = {name: Site(random_rows(8, seed), random_rows(5, 40)) for seed, name in enumerate(("a", "b"))}
    outcomes = train_in_process(job, sites, folder)
    _write_result(folder / "a", job, outcomes["a"].parts, None)
    return outcomes, Trained(folder / "a", folder / "server-state")


def loss_of(model: LocalModel) -> float:
    found = likelihoods(model.logits, random_rows(5, 40))
    return -sum(each.log_probability for each in found) / sum(each.tokens for each in found)


@pytest.mark.parametrize("method", ["lora", "full", "tail", "per_client"])
def test_what_a_job_trained_scores_as_it_did_in_the_job(method: str, llama: Path, tmp_path: Path) -> None:
    job = job_of(llama, method)
    outcomes, trained_by = trained(job, tmp_path)
    in_job = [event["loss"] for event in outcomes["a"].events if event["event"] == "evaluation"]
    if method == "tail":
        trained_by = Trained(trained_by.result, None)
    assert loss_of(load_local_model(str(llama), trained_by=trained_by)) == pytest.approx(in_job[-1], rel=1e-5)
    assert loss_of(load_local_model(str(llama))) == pytest.approx(in_job[0], rel=1e-5)
    assert abs(in_job[-1] - in_job[0]) > 1e-3


def test_results_that_do_not_go_together_are_refused(llama: Path, tmp_path: Path) -> None:
    job = job_of(llama, "lora")
    _, trained_by = trained(job, tmp_path)
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    save_word_tokenizer(other)
    wide = save_tiny_model("llama", tmp_path / "wide", hidden_size=64)
    save_word_tokenizer(wide)

    def refused(name: Path, by: Trained) -> FlglmError:
        with pytest.raises((UsageError, CheckpointError)) as error:
            load_local_model(str(name), trained_by=by)
        return error.value

    assert "the job trained the trunk too" in refused(llama, Trained(trained_by.result, None)).message
    assert "another model" in refused(other, trained_by).message
    assert "not those that the job trains" in refused(wide, trained_by).message
    assert "no finished job" in refused(llama, Trained(tmp_path, trained_by.server_state)).message
    assert "no checkpoint" in refused(llama, Trained(trained_by.result, tmp_path)).message
    longer = job.model_copy(update={"rounds": job.rounds.model_copy(update={"count": 9})})
    (tmp_path / "a" / "flglm.json").write_text(f'{{"job": {longer.model_dump_json()}}}')
    assert "of round 2 of 9" in refused(llama, trained_by).message
    renamed = job.model_copy(update={"name": "renamed"})
    (tmp_path / "a" / "flglm.json").write_text(f'{{"job": {renamed.model_dump_json()}}}')
    assert "another job" in refused(llama, trained_by).message
    (tmp_path / "a" / "flglm.json").write_text("[]")
    assert "not a job's result" in refused(llama, trained_by).message


# ROUGE


def test_rouge_by_hand() -> None:
    """Words in common: the, cat, on, mat, of 5 and 6; pairs: the cat, of 4 and 5; in order all four words."""
    pytest.importorskip("rouge_score", reason="the extra 'eval' is not installed")
    found = rouge()(["the cat sat on the mat"] * 2, ["the cat on a mat", ""])
    assert found == pytest.approx({"rouge1": 8 / 11 / 2, "rouge2": 2 / 9 / 2, "rougeL": 8 / 11 / 2})


def test_without_the_library_rouge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UsageError, match="rouge-score") as error:
        rouge()
    assert error.value.hint == "pip install 'flglm[eval]'"
