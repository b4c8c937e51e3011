"""benchmarks.methods: what it computes from figures, and that its runs measure what they say."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from benchmarks import methods
from benchmarks.cells import Cells
from benchmarks.client_flops import step_flops
from benchmarks.corpora import rows_of, shortened
from benchmarks.method_report import CENTRALISED, cost_of_sources, gap, gaps_of, given_back
from benchmarks.method_runs import GRID, Bench, deal, descend, joint, make_job, whole
from benchmarks.method_table import BY_SOURCE, FEDAVG, IID, METHODS, SETTINGS, WITH_SGD
from benchmarks.tiny_corpora import CORPORA, MAX_LENGTH, save_model
from benchmarks.tiny_models import VOCABULARY
from shared.errors import DataError, UsageError
from shared.model.checkpoint import Checkpoint, checkpoint_of
from worker_client.batches import pack_rows
from worker_client.client import load_tokenizer
from worker_client.data import Row
from worker_client.head_tail import load_client_parts
from worker_client.shapes import Pair


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def bench(model: Path) -> Bench:
    return Bench(model, CORPORA["tasks"], steps=4, local_steps=2, batch=6, seed=0)


# From figures


def test_gaps_are_fractions_of_the_centralised_loss() -> None:
    assert gap(4.04, 4.0) == pytest.approx(0.01)
    found = {
        ("lora", IID): {"loss": 2.2},
        ("lora", BY_SOURCE): {"loss": 3.3},
        ("lora", CENTRALISED): {"loss": 2.0},
        ("full", IID): {"loss": 1.9},
        ("full", BY_SOURCE): {"loss": 1.9},
        ("full", CENTRALISED): {"loss": 2.0},
    }
    assert gaps_of(found, IID) == pytest.approx({"lora": 0.1, "full": -0.05})
    assert cost_of_sources(found) == pytest.approx({"lora": 1.5, "full": 1.0})


@pytest.mark.parametrize(("other", "share"), [(3.0, 0.0), (2.5, 0.5), (2.0, 1.0), (3.5, -0.5)])
def test_what_is_given_back_is_a_share_of_what_was_lost(other: float, share: float) -> None:
    assert given_back(iid=2.0, fedavg=3.0, other=other) == pytest.approx(share)


def test_where_nothing_was_lost_nothing_is_given_back() -> None:
    assert given_back(iid=2.0, fedavg=1.9, other=1.5) is None


@pytest.mark.parametrize("start", [1e-4, 1e-3, 3.0])
def test_the_grid_is_walked_to_a_minimum_with_known_neighbours(start: float) -> None:
    losses = dict(zip(GRID, [9, 8, 5, 4, 6, 7, 8, 9, 10, 11, 12, 13], strict=True))
    found = descend(GRID, start, lambda rate: float(losses[rate]))
    assert min(found, key=lambda rate: found[rate]) == 3e-3
    assert {1e-3, 3e-3, 1e-2} <= found.keys()


def test_a_grid_may_end_at_its_minimum() -> None:
    assert descend((1.0, 2.0), 2.0, lambda rate: rate) == {2.0: 2.0, 1.0: 1.0}


# Cells


def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"loss": 1.5}

    for _ in range(2):
        assert Cells(tmp_path, {"steps": 3}).figures("a b/c", measure) == {"loss": 1.5}
    assert len(calls) == 1
    with pytest.raises(UsageError, match=r"other settings \(steps\)"):
        Cells(tmp_path, {"steps": 4})


def test_a_cell_that_failed_is_measured_again(tmp_path: Path) -> None:
    cells = Cells(tmp_path, {})

    def fails() -> dict[str, Any]:
        raise DataError("no rows")

    with pytest.raises(DataError):
        cells.figures("a", fails)
    assert cells.figures("a", lambda: {"loss": 1.0}) == {"loss": 1.0}


# Rows


def test_prompts_lose_their_beginning_and_keep_their_completion(model: Path) -> None:
    tokenizer = load_tokenizer(Checkpoint(str(model)))
    pair = Pair(" ".join(f"w{number}" for number in range(10, 40)), " w2")
    cut = shortened(pair, tokenizer, 8)
    assert cut == Pair("w34 w35 w36 w37 w38 w39", " w2")
    assert rows_of([cut], tokenizer, 8) == [Row((34, 35, 36, 37, 38, 39, 2, 1), (False,) * 6 + (True, True))]
    with pytest.raises(DataError, match="no room"):
        shortened(Pair("w5", " w6" * 8), tokenizer, 8)


def test_rows_are_dealt_by_source_or_alike() -> None:
    corpus = CORPORA["tasks"]
    by_source = deal(corpus, SETTINGS[BY_SOURCE], 0)
    assert sorted(map(len, by_source.values())) == sorted(map(len, corpus.train.values()))
    assert {tuple(mine) for mine in by_source.values()} == {tuple(mine) for mine in corpus.train.values()}
    alike = deal(corpus, SETTINGS[IID], 0)
    pooled = sorted(str(pair) for mine in corpus.train.values() for pair in mine)
    assert sorted(str(pair) for mine in alike.values() for pair in mine) == pooled
    assert alike != by_source
    assert {len(mine) for mine in alike.values()} == {len(pooled) // 3}


# Runs


@pytest.mark.parametrize("method", ["lora+dora", "prefix", "prompt", "plain_fedavg full"])
def test_one_client_scores_as_one_process_does(bench: Bench, method: str) -> None:
    """Split training of one client is exact: so is what is read back into a whole model, and how it is scored."""
    row = METHODS[method]
    job = make_job(bench, row, 1, training={"learning_rate": 1e-2})
    plain = make_job(bench, METHODS[method.removeprefix("plain_fedavg ")], 1, training={"learning_rate": 1e-2})
    dealt = deal(bench.corpus, SETTINGS["1 client"], 0)
    split, central = joint(bench, job, dealt), whole(bench, plain, dealt)
    # Clipping is by part where there are parts.
    assert split["loss"] == pytest.approx(central["loss"], rel=2e-3)
    untrained = whole(bench, make_job(bench, row, 1, training={"learning_rate": 1e-9}), dealt)
    assert abs(untrained["loss"] - central["loss"]) > 5 * abs(split["loss"] - central["loss"])
    assert split["accuracy"] == central["accuracy"]
    assert split["bytes_up_per_client"] > 0


def test_operations_are_those_of_the_client_s_blocks(bench: Bench) -> None:
    """Llama: d 32, 4 heads of 8, 2 for keys and values, MLP 64; rows of 5 tokens, of which 4 are predicted."""
    rows, tokens, predicted, width = 3, 15, 12, 32
    linear = 2 * tokens * (width * 32 + 2 * width * 16 + 32 * width + 3 * width * 64)
    attention = rows * 2 * (2 * 5 * 5 * 32)
    block, output = linear + attention, 2 * predicted * width * VOCABULARY
    batch = pack_rows([Row((5, 6, 7, 8, 9), (True,) * 5)] * rows)

    def counted(method: str) -> int:
        job = make_job(bench, METHODS[method], 1)
        return step_flops(load_client_parts(checkpoint_of(job), job), batch)

    # Forward once, backward twice: gradients of inputs and of weights.
    assert counted("full") == 3 * (2 * block + output)
    assert counted("plain_fedavg full") == 3 * (4 * block + output)
    # Frozen weights need no gradients, LoRA's are few, and nothing comes before the head's first block.
    assert 2 * (block + output) < counted("lora") < counted("full")
    assert counted("plain_fedavg lora") - counted("lora") > 2 * (2 * block)


def test_a_quick_run_measures_everything_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--json", "--methods", "plain_fedavg lora", "--data", "tasks", "--out", str(tmp_path / "out")]
    methods.main(words)
    first = json.loads(capsys.readouterr().out)
    cells = first["figures"]["cells"]["tasks"]
    iid, central = (cells[f"plain_fedavg lora, {setting}"] for setting in (IID, CENTRALISED))
    worst = first["figures"]["worst_iid_gap_to_centralised"]
    assert worst == pytest.approx(iid["loss"] / central["loss"] - 1)
    assert first["goals"][0]["name"] == "worst_iid_gap_to_centralised"
    assert iid["client_peak_bytes"] > iid["broker_peak_bytes"] > 10e6
    assert iid["client_flops"] > 0
    assert 0 <= iid["accuracy"] <= 1
    assert set(iid["metrics"]) == {"rte", "cb", "sst2"}
    assert (tmp_path / "out" / "methods.html").read_text().count("<svg") == 1
    assert json.loads((tmp_path / "out" / "methods.json").read_text()) == first["figures"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("tasks*.json")}
    methods.main(words)
    assert json.loads(capsys.readouterr().out) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("tasks*.json")} == before


def test_with_fedsgd_and_nothing_clipped_nothing_is_left_of_the_gap(bench: Bench, tmp_path: Path) -> None:
    gaps = methods.measure_unclipped(bench, ["lora", "plain_fedavg lora", "prompt"], Cells(tmp_path, {}))
    assert gaps.keys() == {"lora", "prompt"}
    assert max(map(abs, gaps.values())) < methods.EXACT


def test_a_spread_is_that_of_three_seeds(bench: Bench, tmp_path: Path) -> None:
    cells = Cells(tmp_path, {})
    spread = methods.measure_spread(bench, ["lora", "plain_fedavg lora"], cells)
    losses = [json.loads(path.read_text())["loss"] for path in tmp_path.glob("tasks_lora_centralised*.json")]
    assert len(set(losses)) == 3
    assert spread["lora"] == spread["plain_fedavg lora"] == pytest.approx(stdev(losses) / mean(losses))


def test_aggregations_are_compared_where_clients_drift(bench: Bench, tmp_path: Path) -> None:
    aggregations = {"fedavg": FEDAVG, "scaffold": WITH_SGD["scaffold"]}
    found = methods.measure_drift(bench, ["lora"], Cells(tmp_path, {}), {}, aggregations)["lora"]
    assert set(found) == {"fedavg, IID, SGD", "fedavg, SGD", "scaffold, SGD"}
    iid, fedavg, scaffold = (found[f"{label}, SGD"] for label in ("fedavg, IID", "fedavg", "scaffold"))
    assert iid["loss"] != fedavg["loss"]
    assert scaffold["given_back"] == given_back(iid["loss"], fedavg["loss"], scaffold["loss"])


def test_steps_are_whole_rounds() -> None:
    with pytest.raises(SystemExit):
        methods.main(["--quick", "--steps", "7"])


def test_rows_of_tiny_corpora_fit(bench: Bench) -> None:
    assert all(len(row.input_ids) <= MAX_LENGTH for row in bench.test)
