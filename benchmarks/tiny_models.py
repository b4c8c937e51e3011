"""A tiny random model of each family, saved as a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from shared.model.families import FAMILIES

VOCABULARY = 97
BLOCKS = 4

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_WINDOW = {"sliding_window": 6}
_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": BLOCKS,
        "num_heads": 4,
        "attention_types": [[["global", "local"], BLOCKS // 2]],
        "window_size": 6,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {name: value for name, value in _LLAMA_LIKE.items() if name not in ("num_key_value_heads", "head_dim")},
    "mistral": _LLAMA_LIKE | _WINDOW,
    "gemma2": _LLAMA_LIKE | _WINDOW,
    "gemma3_text": _LLAMA_LIKE | _WINDOW,
}
_NO_DROPOUT = (
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "embed_dropout",
    "attention_dropout", "hidden_dropout",
)  # fmt: skip


def save_tiny_model(
    model_type: str, folder: Path, *, seed: int = 0, tied: bool = False, max_shard_size: str = "5GB", **changes: Any
) -> Path:
    """Save a random model of 4 blocks, width 32, 97 tokens, without dropout. Every family of the table has one."""
    assert model_type in FAMILIES
    settings = _SETTINGS.get(model_type, _LLAMA_LIKE) | {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(model_type, **settings | changes)
    for name in _NO_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_word_tokenizer(folder: Path, words: int = VOCABULARY) -> None:
    """A tokenizer whose words are w0, w1, ...: word i is token i, token 1 is the end."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w0").save_pretrained(folder)
