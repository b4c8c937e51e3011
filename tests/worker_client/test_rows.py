"""Rows from files: five shapes, what counts in the loss, what is left out and counted, and every way to be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.tiny_models import save_word_tokenizer
from shared.errors import DataError
from worker_client.batches import batch_indices, pack_rows
from worker_client.data import Row, load_rows, split_validation, tokenize
from worker_client.shapes import SHAPES, Pair, recognise

CHAT = (
    "{% for m in messages %}{% if m.content == 'w66' %}{{ raise_exception('no w66 here') }}{% endif %}"
    "w9 {{ m.content }} w8 {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """Word w<i> is token i, token 1 is the end; w9 and w8 open and close a turn of a chat."""
    save_word_tokenizer(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    made.chat_template = CHAT
    return made


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_token_of_a_text_counts(tokenizer: Any) -> None:
    assert tokenize({"text": "w5 w6"}, tokenizer) == Row((5, 6, 1), (True, True, True))


def test_of_prompt_and_completion_the_completion_and_the_end_count(tokenizer: Any) -> None:
    row = tokenize({"prompt": "w5 w6", "completion": "w7"}, tokenizer)
    assert row == Row((5, 6, 7, 1), (False, False, True, True))
    assert row.target_tokens == 2


def test_of_messages_the_assistants_words_count(tokenizer: Any) -> None:
    turns = [("user", "w20"), ("assistant", "w30 w31"), ("user", "w21"), ("assistant", "w32")]
    row = tokenize({"messages": [{"role": role, "content": text} for role, text in turns]}, tokenizer)
    counted = [token for token, counts in zip(row.input_ids, row.counts, strict=True) if counts]
    assert row.input_ids == (9, 20, 8, 9, 30, 31, 8, 9, 21, 8, 9, 32, 8)
    assert counted == [30, 31, 8, 32, 8]


def test_alpaca_rows_are_its_own_prompt_and_the_output(tokenizer: Any) -> None:
    below = "Below is an instruction that describes a task"
    plain = {"instruction": "w5 .", "output": "w7"}
    assert recognise(plain).read(plain) == Pair(
        f"{below}. Write a response that appropriately completes the request.\n\n### Instruction:\nw5 .\n\n"
        "### Response:\n",
        "w7",
    )
    with_input = plain | {"input": "w6"}
    assert recognise(with_input).read(with_input) == Pair(
        f"{below}, paired with an input that provides further context. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nw5 .\n\n### Input:\nw6\n\n### Response:\n",
        "w7",
    )
    assert (
        tokenize(plain | {"input": ""}, tokenizer)
        == tokenize(plain, tokenizer)
        == tokenize(plain | {"input": None}, tokenizer)
    )
    row = tokenize(with_input, tokenizer)
    assert [token for token, counts in zip(row.input_ids, row.counts, strict=True) if counts] == [7, 1]


def test_sharegpt_rows_are_the_messages_that_they_mean(tokenizer: Any) -> None:
    said = [("system", "w4"), ("human", "w20"), ("gpt", "w30"), ("user", "w21"), ("assistant", "w31")]
    roles = ("system", "user", "assistant", "user", "assistant")
    sharegpt = {"conversations": [{"from": who, "value": text} for who, text in said]}
    messages = [{"role": role, "content": text} for role, (_, text) in zip(roles, said, strict=True)]
    assert tokenize(sharegpt, tokenizer) == tokenize({"messages": messages}, tokenizer)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["question", "answer"],
            '{"prompt", "completion"}, the nearest shape: "prompt" is missing (is it "question"?)',
        ),
        (["promt", "completion"], '"prompt" is missing (is it "promt"?)'),
        (["instruction", "response"], '{"instruction", "output"}, the nearest shape: "output" is missing'),
        (["conversation", "id"], '{"conversations"}, the nearest shape: "conversations" is missing (is it "conv'),
        (["Text"], '{"text"}, the nearest shape: "text" is missing (is it "Text"?)'),
        (["message"], '{"messages"}, the nearest shape'),
        (["label", "n"], "expected one of "),
        ([], "expected one of "),
    ],
)
def test_an_unknown_shape_is_told_the_nearest_one(keys: list[str], said: str, tokenizer: Any) -> None:
    with pytest.raises(DataError) as error:
        tokenize(dict.fromkeys(keys, "w5"), tokenizer)
    assert said in error.value.message
    assert error.value.hint is not None
    assert all(str(shape) in error.value.hint for shape in SHAPES)


def test_long_rows_are_cut_or_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl", {"text": "w5 w6 w7 w8"}, {"text": "w5"}, {"prompt": "w5 w6 w7", "completion": "w8"}
    )
    cut = load_rows(path, tokenizer, max_length=3)
    assert [row.input_ids for row in cut.rows] == [(5, 6, 7), (5, 1)]
    assert (cut.truncated, cut.skipped_long, cut.without_target) == (2, 0, 1)
    skipped = load_rows(path, tokenizer, max_length=3, too_long="skip")
    assert [row.input_ids for row in skipped.rows] == [(5, 1)]
    assert (skipped.truncated, skipped.skipped_long) == (0, 2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nothing", "r.jsonl:2: not JSON"),
        ("[1]", "r.jsonl:2: not a JSON object"),
        ('{"txt": "w5"}', 'expected {"text"}'),
        ('{"text": 5}', '"text" must be text, not int'),
        ('{"prompt": "w5"}', 'expected {"prompt", "completion"}, the nearest shape: "completion" is missing'),
        ('{"messages": []}', '"messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', '"messages" must be a list'),
        ('{"messages": "w5"}', '"messages" must be a list'),
        ('{"messages": [{"role": "assistant", "content": "w5"}]}', "the assistant speaks first"),
        ('{"prompt": "w5", "completion": null}', '"completion" must be text, not NoneType'),
        ('{"conversations": [{"from": "human"}]}', '"conversations" must be a list'),
        ('{"conversations": [{"from": "bing", "value": "w5"}]}', "\"from\" is 'bing'"),
        ('{"conversations": [{"from": "gpt", "value": "w5"}]}', "the assistant speaks first"),
        ('{"instruction": "w5", "output": 5}', '"output" must be text, not int'),
        ('{"instruction": "w5", "input": 5, "output": "w5"}', '"input" must be text, not int'),
        ("[" * 100_000, "not JSON"),
        ('{"text": "w5 \\ud83d"}', "half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "w66"}, {"role": "assistant", "content": "w6"}]}', "no w66 here"),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_reason(line: str, said: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "w5"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        load_rows(path, tokenizer, max_length=9)
    assert f"{path}:2: " in error.value.message
    assert said in error.value.message


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"messages": [{"role": "user", "content": "w5"}]}\n'])
def test_no_usable_row_is_an_error(content: bytes, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no usable row"):
        load_rows(path, tokenizer, max_length=9)


def test_files_that_cannot_be_read_are_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_rows(tmp_path / "none.jsonl", tokenizer, max_length=9)
    (tmp_path / "r.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(tmp_path / "r.jsonl", tokenizer, max_length=9)


def test_a_byte_order_mark_is_passed_over(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "w5"}\n')
    assert load_rows(tmp_path / "r.jsonl", tokenizer, max_length=9).rows[0].input_ids == (5, 1)


def test_a_template_that_rewrites_earlier_turns_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages[-2:] %}w9 {{ m.content }} {% endfor %}"
    turns = [("user", "w20"), ("assistant", "w30"), ("user", "w21"), ("assistant", "w31")]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        tokenize({"messages": [{"role": role, "content": text} for role, text in turns]}, tokenizer)


def test_a_template_that_fails_on_what_a_message_holds_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{% for tool in m.tools %}{{ tool }}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "w20", "tools": 5}, {"role": "assistant", "content": "w30"}]
    with pytest.raises(DataError, match="'int' object is not iterable"):
        tokenize({"messages": messages}, tokenizer)


def test_a_tokenizer_without_template_or_end_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenize({"messages": [{"role": "user", "content": "w5"}]}, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        tokenize({"text": "w5"}, tokenizer)


def test_held_out_rows_are_disjoint_and_the_same_for_the_same_seed() -> None:
    rows = [Row((index, 1), (True, True)) for index in range(20)]
    train, held_out = split_validation(rows, 0.25, 7)
    assert (train, held_out) == split_validation(rows, 0.25, 7)
    assert len(held_out) == 5
    assert sorted(row.input_ids[0] for row in train + held_out) == list(range(20))
    assert split_validation(rows, 0.25, 8)[1] != held_out
    with pytest.raises(DataError, match="one row"):
        split_validation(rows[:1], 0.5, 0)


def test_each_epoch_takes_every_row_once_whatever_the_batch() -> None:
    steps = [batch_indices(10, 4, step, seed=3) for step in range(5)]
    taken = [index for step in steps for index in step]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert batch_indices(10, 4, 3, seed=3) == steps[3]
    assert batch_indices(3, 7, 0, seed=0) != batch_indices(3, 7, 0, seed=1)


def test_a_batch_is_rows_end_to_end_with_the_positions_that_predict() -> None:
    batch = pack_rows([Row((5, 6, 7), (False, False, True)), Row((8, 1), (True, True))])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 1]
    assert batch.lengths == (3, 2)
    assert batch.at.tolist() == [1, 3]
    assert batch.targets.tolist() == [7, 1]
    assert batch.row.tolist() == [0, 1]
    assert batch.at.dtype == torch.int64
