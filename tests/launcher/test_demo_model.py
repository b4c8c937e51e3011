from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.demo_data import hospital_rows, public_texts
from launcher.demo_hospitals import DISEASES, HOSPITALS
from launcher.demo_model import CONTEXT_TOKENS, EOS, LAYERS, PAD, UNK, build_model, build_tokenizer, write_demo_model

TEXTS = public_texts(3, 600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo-model")
    write_demo_model(directory, TEXTS, 3)
    return directory


def test_the_tokenizer_knows_every_word_that_hospitals_write(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, hospital in HOSPITALS.items():
        for row in hospital_rows(hospital, Random(f"3/{name}/train"), 600):
            ids = tokenizer(row["prompt"] + row["completion"]).input_ids
            assert tokenizer.unk_token_id not in ids
            assert len(ids) < CONTEXT_TOKENS


def test_an_unknown_word_becomes_the_unknown_token() -> None:
    tokenizer = build_tokenizer(["A man of 40 years."])
    assert tokenizer.convert_ids_to_tokens(tokenizer(" zebra man").input_ids) == [UNK, " man"]


def test_text_survives_encoding_and_decoding(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:50]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_prompt_and_completion_can_be_tokenized_apart(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = hospital_rows(HOSPITALS["north"], Random(0), 1)[0]
    apart = tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"], add_special_tokens=False).input_ids
    assert apart == tokenizer(row["prompt"] + row["completion"]).input_ids


def test_a_disease_is_one_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {len(tokenizer(f" {disease}").input_ids) for disease in DISEASES} == {1}


def test_special_tokens_are_saved_and_distinct(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == (PAD, EOS, UNK)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_the_model_loads_back_as_it_was_built(folder: Path) -> None:
    assert (folder / "model.safetensors").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.vocab_size == len(tokenizer)
    assert loaded.config.num_hidden_layers == LAYERS
    assert not loaded.config.tie_word_embeddings
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    built = build_model(len(tokenizer), 3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), built.parameters(), strict=True))


def test_weights_and_tokenizer_follow_from_the_arguments(folder: Path, tmp_path: Path) -> None:
    write_demo_model(tmp_path / "same", TEXTS, 3)
    write_demo_model(tmp_path / "other", TEXTS, 4)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "same" / file).read_bytes() == (folder / file).read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_building_a_model_leaves_the_random_state_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    build_model(50, 0)
    assert torch.equal(torch.rand(1), expected)


def test_random_weights_generate_something(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("Pt 40 F.\nDiagnosis:", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > prompt.input_ids.shape[1]
