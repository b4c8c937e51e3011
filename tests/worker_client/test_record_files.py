"""Records from every kind of file are the same records; what is none is named by file, line and reason."""

import builtins
import csv
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DataError, UsageError
from worker_client.record_files import read_entries, read_records

RECORDS = [{"prompt": 'a\nb, "c"', "completion": "ü\u2028"}, {"prompt": "", "completion": "x"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "lines.json").write_text("\n".join(lines) + "\n")
    (tmp_path / "list.json").write_text(json.dumps(RECORDS, indent=2, ensure_ascii=False))
    with (tmp_path / "a.CSV").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(RECORDS)
    found = {path.name: list(read_records(path)) for path in tmp_path.iterdir()}
    assert all([record for _, record in records] == RECORDS for records in found.values())
    assert {name: [line for line, _ in records] for name, records in found.items()} == {
        "a.jsonl": [1, 2],
        "lines.json": [1, 2],
        "list.json": [2, 6],
        "a.CSV": [2, 4],
    }


@given(st.lists(st.dictionaries(TEXT, TEXT, max_size=3)), st.sampled_from([None, 0, 2]))
def test_a_list_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(records, indent=indent))
    assert [record for _, record in read_records(path)] == records


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1))
def test_csv_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("one", "two"), *rows])
    assert [(record["one"], record["two"]) for _, record in read_records(path)] == rows


@given(st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.json", "a.csv"]))
def test_whatever_a_file_holds_it_is_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    found = []
    with suppress(DataError):
        for entry in read_entries(path):
            found.append(entry)  # noqa: PERF402 - what came before an error counts
    assert all(isinstance(entry.record, dict) or str(path) in entry.record.message for entry in found)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{}\nno\n{"a": 1}\n', "a.jsonl:2: not JSON"),
        ("a.json", "[{},\n {},\n 5]", "a.json:3: not a JSON object"),
        ("a.json", "[{},\n {}\n {}]", "a.json:2: not JSON (expected ',')"),
        ("a.json", '[{},\n {"a": }]', "a.json:2: not JSON"),
        ("a.json", "[{}", "a.json:1: not JSON"),
        ("a.json", "[{},]", "a.json:1: not JSON"),
        ("a.json", "[{}] []", "something follows the list"),
        ("a.json", "[" * 100_000, "a.json:1: not JSON"),
        ("a.json", '{"data": [\n{}]}', "a.json:1: not JSON"),
        ("a.csv", "a,b\n1,2\n\n3\n", "a.csv:4: 1 values for 2 columns"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: the first line must name the columns"),
        ("a.csv", 'a,b\n"1,2\n', "a.csv:2: not CSV"),
    ],
)
def test_what_is_no_record_is_named(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        list(read_records(tmp_path / name))
    assert said in error.value.message


def test_lines_after_a_bad_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('no\n{"a": 1}\n[]\n{"a": 2}\n')
    entries = list(read_entries(tmp_path / "a.jsonl"))
    assert [entry.line for entry in entries] == [1, 2, 3, 4]
    assert [entry.record for entry in entries if isinstance(entry.record, dict)] == [{"a": 1}, {"a": 2}]


def test_without_the_library_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return imported(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="needs the library 'datasets'") as error:
        list(read_records(tmp_path / "a.parquet"))
    assert error.value.hint == "pip install 'flglm[data]', or write JSON lines"


def test_parquet_is_read_and_nothing_is_copied_to_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'data' is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    from pyarrow import parquet

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = [{"messages": [{"role": "user", "content": "private words"}], "n": n} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == list(enumerate(rows, start=1))
    assert not [path for path in cache.rglob("*") if path.is_file() and b"private words" in path.read_bytes()]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"b.parquet: not Parquet"):
        list(read_records(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match=r"none.parquet: No such file"):
        list(read_records(tmp_path / "none.parquet"))
