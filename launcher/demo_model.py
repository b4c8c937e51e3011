"""The demo's base model: a word-level tokenizer and a small Llama that has learnt nothing yet."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import WordLevelTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
MAX_WORDS = 4096
CONTEXT_TOKENS = 256
LAYERS = 6
HIDDEN = 96
HEADS = 4

# A word keeps the space before it, so that decoding is joining, and a prompt and its completion can be tokenized apart.
WORDS = r" ?\w+| ?[^\w\s]|\s"


def write_demo_model(directory: Path, texts: Iterable[str], seed: int) -> None:
    """Save a tokenizer of the texts' words and a randomly initialised Llama, as `save_pretrained` lays them out."""
    disable_progress_bar()  # a bar for one small file would only stand in the way
    tokenizer = build_tokenizer(texts)
    model = build_model(len(tokenizer), seed)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word; words that the texts lack become `<unk>`. No token is added at the start or end of a text."""
    tokenizer = Tokenizer(WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = Split(Regex(WORDS), "isolated")
    tokenizer.decoder = Fuse()
    trainer = WordLevelTrainer(vocab_size=MAX_WORDS, special_tokens=[PAD, EOS, UNK], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def build_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Random weights, the same for the same seed; leaves torch's own random state alone."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
