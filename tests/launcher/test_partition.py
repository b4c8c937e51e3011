"""Rows dealt to clients: each lands exactly once and as it was, skewed as asked for, the same for the same seed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shared_data import FOLDER
from launcher.main import main
from launcher.partition.files import index_rows, write_clients
from launcher.partition.rules import (
    MAX_LABELS,
    by_dirichlet,
    by_field,
    by_size,
    dirichlet_shares,
    equal_shares,
    power_law_shares,
)
from shared.errors import UsageError

SEEDS = st.integers(0, 2**32)
LABELS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=200)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["partition", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def sizes_of(assigned: list[int], clients: int) -> list[int]:
    return [assigned.count(client) for client in range(clients)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """240 rows of three topics, 120, 80 and 40."""
    lines = [json.dumps({"text": f"row {n}", "topic": "aaabbc"[n % 6], "n": n % 2}) for n in range(240)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


# Rules


@given(LABELS, st.integers(1, 12), st.sampled_from([1e-4, 0.1, 1.0, 100.0, 1e6]), SEEDS)
def test_dirichlet_gives_every_row_to_one_client_in_equal_sizes(
    labels: list[str], clients: int, alpha: float, seed: int
) -> None:
    assigned = by_dirichlet(labels, clients, alpha, seed)
    assert len(assigned) == len(labels)
    sizes = sizes_of(assigned, clients)
    assert sum(sizes) == len(labels)
    assert max(sizes) - min(sizes) <= 1
    assert assigned == by_dirichlet(labels, clients, alpha, seed)


@given(st.integers(0, 500), st.integers(1, 20), st.floats(0, 10), SEEDS)
def test_sizes_follow_the_shares_to_one_row(rows: int, clients: int, exponent: float, seed: int) -> None:
    for shares in (power_law_shares(clients, exponent), dirichlet_shares(clients, 0.5, seed), equal_shares(clients)):
        sizes = sizes_of(by_size(rows, shares, seed), clients)
        assert sum(sizes) == rows
        assert all(abs(size - share * rows) <= 1 for size, share in zip(sizes, shares, strict=True))


def mean_distance(labels: list[str], assigned: list[int], clients: int) -> float:
    """Total variation between each client's mix of labels and the file's, on average."""
    whole = Counter(labels)
    distances = []
    for client in range(clients):
        mine = Counter(label for label, owner in zip(labels, assigned, strict=True) if owner == client)
        shares = [(mine[label] / mine.total(), whole[label] / whole.total()) for label in whole]
        distances.append(sum(abs(a - b) for a, b in shares) / 2)
    return float(np.mean(distances))


def test_the_smaller_alpha_the_less_alike_are_the_clients() -> None:
    labels = list("abcdefgh" * 250)
    distance = {
        alpha: np.mean([mean_distance(labels, by_dirichlet(labels, 10, alpha, seed), 10) for seed in range(5)])
        for alpha in (0.01, 1.0, 1000.0)
    }
    # Dirichlet(alpha / 8, ...) once for each of 10 clients: one label alone at one end, the file's mix at the other.
    assert distance[0.01] > 0.6
    assert distance[0.01] > distance[1.0] + 0.05
    assert distance[1.0] > 0.3
    assert distance[1000.0] < 0.1


def test_with_alpha_near_zero_a_client_sees_one_label_while_there_is_enough_of_it() -> None:
    labels = ["a"] * 1000 + ["b"] * 1000
    assigned = by_dirichlet(labels, 2, 1e-4, seed=1)
    mixes = [{labels[row] for row, owner in enumerate(assigned) if owner == client} for client in range(2)]
    assert mixes in ([{"a"}, {"b"}], [{"b"}, {"a"}], [{"a", "b"}, {"a", "b"}])
    distinct = [by_dirichlet(labels, 2, 1e-4, seed) for seed in range(8)]
    assert any(mean_distance(labels, each, 2) == 0.5 for each in distinct)


def test_a_field_as_label_of_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 1000"):
        by_dirichlet([str(n) for n in range(MAX_LABELS + 1)], 2, 1.0, 0)


def test_values_of_a_field_stay_together_and_fill_the_emptiest_client() -> None:
    labels = list("aaaaa" + "bbb" + "cc" + "d")
    assert by_field(labels, None) == [0] * 5 + [1] * 3 + [2] * 2 + [3]
    assert by_field(labels, 2) == [0] * 5 + [1] * 3 + [1] * 2 + [0]
    with pytest.raises(UsageError, match="4 values, fewer than 5 clients"):
        by_field(labels, 5)


def test_power_law_by_hand() -> None:
    assert power_law_shares(3, 1.0).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert sizes_of(by_size(110, power_law_shares(3, 1.0), 0), 3) == [60, 30, 20]
    assert sizes_of(by_size(110, power_law_shares(3, 0.0), 0), 3) == [37, 37, 36]


# Files


@given(st.lists(st.tuples(st.text(max_size=8), st.sampled_from(["\n", "\r\n", "\n\n", " \n"])), min_size=1), st.data())
def test_rows_are_copied_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("copied")
    lines = [f' {{"text" : {json.dumps(text, ensure_ascii=False)}}}'.encode() for text, _ in rows]
    content = b"".join(line + end.encode() for line, (_, end) in zip(lines, rows, strict=True))
    path = folder / "rows.jsonl"
    path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + content)
    indexed = index_rows(path, ["text"])
    assert indexed.labels["text"] == tuple(text for text, _ in rows)
    assert indexed.blank_lines == sum(end == "\n\n" for _, end in rows)
    assigned = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    write_clients(indexed, assigned, ["0", "1", "2"], folder)
    for client in range(3):
        expected = [
            line + end.replace("\n\n", "\n").encode()
            for line, (_, end), owner in zip(lines, rows, assigned, strict=True)
            if owner == client
        ]
        assert (folder / str(client)).read_bytes() == b"".join(expected)


def test_a_last_line_without_end_gets_one(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b'{"a": 1}\n{"a": 2}')
    write_clients(index_rows(tmp_path / "rows", ["a"]), [1, 0], ["x", "y"], tmp_path)
    assert (tmp_path / "x").read_bytes() == b'{"a": 2}\n'
    assert (tmp_path / "y").read_bytes() == b'{"a": 1}\n'


# The command

RULES = {
    "field": ["--by", "field=topic"],
    "dirichlet": ["--dirichlet", "0.5", "--label", "topic", "--clients", "4"],
    "power": ["--quantity-skew", "power=1.2", "--clients", "5"],
    "sizes": ["--quantity-skew", "dirichlet=2", "--clients", "5"],
    "iid": ["--iid", "--label", "topic", "--clients", "7"],
}


@pytest.mark.parametrize("words", RULES.values(), ids=RULES)
def test_every_rule_writes_every_row_once_and_the_same_for_the_same_seed(
    words: list[str], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("one", "two"):
        assert run(str(rows), "--out", str(tmp_path / out), "--seed", "3", "--format", "json", *words) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[0])["data"]
    files = sorted((tmp_path / "one").glob("client-*.jsonl"))
    assert [client["file"] for client in said["clients"]] == [file.name for file in files]
    lines = [file.read_text().splitlines(keepends=True) for file in files]
    assert [client["rows"] for client in said["clients"]] == [len(part) for part in lines]
    assert sorted(line for part in lines for line in part) == sorted(rows.read_text().splitlines(keepends=True))
    for part, client in zip(lines, said["clients"], strict=True):
        numbers = [json.loads(line)["text"] for line in part]
        assert numbers == sorted(numbers, key=lambda text: int(text.split()[1]))
        if said["label"]:
            assert Counter(json.loads(line)["topic"] for line in part) == Counter(client["labels"])
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    written = json.loads((tmp_path / "one" / "partition.json").read_text())
    assert written == {key: value for key, value in said.items() if key != "out"}


def test_by_a_field_each_client_has_one_value(rows: Path, tmp_path: Path) -> None:
    assert run(str(rows), "--out", str(tmp_path / "out"), "--by", "field=topic") == 0
    summary = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert [client["labels"] for client in summary["clients"]] == [{"a": 120}, {"b": 80}, {"c": 40}]


def test_another_seed_deals_otherwise(rows: Path, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        assert run(str(rows), "--out", str(tmp_path / seed), "--iid", "--clients", "2", "--seed", seed) == 0
    assert (tmp_path / "1" / "client-0.jsonl").read_bytes() != (tmp_path / "2" / "client-0.jsonl").read_bytes()


def test_people_get_a_table_and_a_picture(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = rows.read_text().replace('"topic": "c"', '"topic": "<script>[bold]"')
    rows.write_text(text)
    assert run(str(rows), "--out", str(tmp_path / "out"), "--iid", "--clients", "2", "--label", "topic") == 0
    said = capsys.readouterr().out
    assert "<script>[bold]" in said
    assert "240 rows to 2 clients" in said
    page = (tmp_path / "out" / "partition.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;[bold]: " in page
    assert page.count('class="part f2"') == 3  # one a client and one in the legend


def test_many_labels_are_shown_as_others(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(rows), "--out", str(tmp_path / "out"), "--iid", "--clients", "2", "--label", "text") == 0
    assert "233 others" in capsys.readouterr().out


def test_an_empty_client_is_an_error_unless_allowed_and_then_it_is_said(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    words = [str(rows), "--out", str(tmp_path / "out"), "--iid", "--clients", "5"]
    assert run(*words) == 4
    assert "would get 0 rows, fewer than --min-rows 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*words, "--min-rows", "0") == 0
    assert "without rows: client-3.jsonl, client-4.jsonl" in capsys.readouterr().out
    assert (tmp_path / "out" / "client-4.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no rule given"),
        (["--iid", "--by", "field=topic"], "--by and --iid given"),
        (["--iid"], "Missing option '--clients'"),
        (["--by", "topic"], "--by topic: expected field=NAME"),
        (["--by", "field=tpoic"], "rows.jsonl:1: no field 'tpoic'; there are n, text, topic"),
        (["--by", "field=topic", "--clients", "9"], "3 values, fewer than 9 clients"),
        (["--dirichlet", "1", "--clients", "2"], "--dirichlet needs --label"),
        (["--dirichlet", "0", "--label", "topic", "--clients", "2"], "--dirichlet 0 is not between"),
        (["--dirichlet", "nan", "--label", "topic", "--clients", "2"], "--dirichlet nan is not between"),
        (["--quantity-skew", "zipf=1", "--clients", "2"], "expected power=EXPONENT or dirichlet=BETA"),
        (["--quantity-skew", "power=x", "--clients", "2"], "expected power=EXPONENT or dirichlet=BETA"),
        (["--quantity-skew", "power=-1", "--clients", "2"], "power -1 is not between"),
        (["--iid", "--clients", "0"], "--clients"),
        (["--iid", "--clients", "2", "--seed", "-1"], "--seed"),
    ],
)
def test_bad_words_are_refused(
    words: list[str], said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(rows), "--out", str(tmp_path / "out"), *words) == 4
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"topic": "a"}\nnothing\n', "rows.jsonl:2: not JSON"),
        (b'{"topic": "a"}\n[1]\n', "rows.jsonl:2: not a JSON object"),
        (b'{"topic": "a"}\n\xff\n', "rows.jsonl:2: not UTF-8"),
        (b'{"topic": ["a"]}\n', "rows.jsonl:1: 'topic' is neither text"),
        (b"[" * 100_000, "rows.jsonl:1: not JSON"),
        (b"\n\n", "rows.jsonl: no row"),
    ],
)
def test_bad_rows_are_named_by_line(
    content: bytes, said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.write_bytes(content)
    assert run(str(rows), "--out", str(tmp_path / "out"), "--by", "field=topic") == 4
    assert said in capsys.readouterr().err


def test_a_missing_file_and_a_folder_with_something_in_it_are_refused(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out"), "--iid", "--clients", "2") == 4
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "client-9.jsonl").write_text("of another time")
    assert run(str(rows), "--out", str(tmp_path / "out"), "--iid", "--clients", "2") == 4
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_medquad_by_its_nine_sources(tmp_path: Path) -> None:
    data = FOLDER / "tasks" / "medquad" / "medquad.jsonl"
    if not data.exists():
        pytest.skip(f"there is no {data}")
    assert run(str(data), "--out", str(tmp_path / "out"), "--by", "field=source") == 0
    summary = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert len(summary["clients"]) == 9
    assert summary["rows"] == 16_407
    copies = [path.read_bytes() for path in (tmp_path / "out").glob("client-*")]
    assert sum(map(len, copies)) == data.stat().st_size
