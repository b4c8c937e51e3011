"""The families of decoders that can be split, and what differs between them.

A family is a table row: everything else is one mechanism (shared/model/carve.py). A row says under which names the
Hugging Face model keeps its parts, and what its base model does once to the embeddings before the first block
(position embeddings, dropout), which therefore belongs to the head alone.
"""

from dataclasses import dataclass, field
from typing import Any

from shared.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Names inside the base model (`model.model`, `transformer`, ...) of one Hugging Face `model_type`."""

    model_type: str
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    positions: str | None = None
    embedding_dropout: str | None = None
    final_norm: str = "norm"
    # The module of a block that keeps its attention.
    attention: str = "self_attn"
    # The attention projections, where LoRA goes unless the job says otherwise.
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    # A tensor's other name in checkpoints, as older versions of transformers saved it.
    aliases: dict[str, str] = field(default_factory=dict)
    # Settings whose value, if truthy, makes a block depend on its index in the whole model.
    refused_settings: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("qwen2"),
        Family("qwen3"),
        Family("mistral"),
        Family("glm"),
        Family("glm4"),
        Family("gemma2"),
        Family("gemma3_text", refused_settings=("use_bidirectional_attention",)),
        Family("phi3", lora_targets=("qkv_proj", "o_proj")),
        Family("olmo2"),
        Family(
            "gpt2",
            blocks="h",
            embedding="wte",
            positions="wpe",
            embedding_dropout="drop",
            final_norm="ln_f",
            attention="attn",
            lora_targets=("attn.c_attn", "attn.c_proj"),
            refused_settings=("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
        ),
        Family(
            "gpt_neo",
            blocks="h",
            embedding="wte",
            positions="wpe",
            embedding_dropout="drop",
            final_norm="ln_f",
            attention="attn.attention",
            lora_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
        ),
        Family(
            "gpt_neox",
            embedding="embed_in",
            embedding_dropout="emb_dropout",
            final_norm="final_layer_norm",
            attention="attention",
            lora_targets=("query_key_value", "attention.dense"),
            aliases={"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"},
        ),
    )
}


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config. Raises ModelError, naming the known ones, if it is not in the table."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"models of type '{config.model_type}' cannot be split", hint=f"known types: {known}")
    for setting in family.refused_settings:
        if getattr(config, setting, None):
            raise ModelError(f"'{config.model_type}' with {setting}={getattr(config, setting)} cannot be split")
    return family


def context_length(config: Any) -> int:
    """The most tokens that a row may have for this model."""
    return int(getattr(config, "max_position_embeddings", 0) or 2**20)


def sliced_config(config: Any, start: int, stop: int) -> Any:
    """A copy of `config` for blocks `start` to `stop` (exclusive): the block count and every per-block list."""
    total = config.num_hidden_layers
    values = config.to_dict()
    for name, value in values.items():
        if isinstance(value, list) and len(value) == total and name != "attention_types":
            values[name] = value[start:stop]
    if "attention_types" in values:  # GPT-Neo counts its list out as [[kinds, repeats], ...]
        values["attention_types"] = [[[kind], 1] for kind in config.attention_layers[start:stop]]
    block_count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[block_count] = stop - start
    return type(config).from_dict(values)
