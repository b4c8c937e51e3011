"""Building head, trunk and tail from a checkpoint, each with its own weights and nothing else.

The same architecture is built with fewer blocks, the modules that the part must not have are taken out, and the
rest is filled from the safetensors files. No modelling code is written anew, so logits stay those of transformers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from shared.errors import ModelError
from shared.model.checkpoint import Checkpoint
from shared.model.draws import draw_weights
from shared.model.families import Family, family_of, sliced_config
from shared.model.kv_cache import RowCache
from shared.model.packing import IMPLEMENTATION, packed_attention, position_ids, row_mask
from shared.model.plan import PartName, SplitPlan

# By `training.trunk_dtype`.
TRUNK_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Absent(nn.Module):
    """Stands where a part has no module; calling it is an error."""


class NoPositions(nn.Module):
    """Adds nothing: position embeddings were added once, at the head."""

    def forward(self, _: Tensor) -> Tensor:
        return torch.zeros(())


@dataclass
class Part:
    """Head, trunk or tail: the module, and where its blocks lie in the whole model.

    `first_position`: that of a row's first token, where something is attended to before it.
    """

    name: PartName
    module: Any
    family: Family
    plan: SplitPlan
    first_position: int = 0

    @property
    def base(self) -> Any:
        """The base model (blocks and norm, no output layer)."""
        return getattr(self.module, self.module.base_model_prefix)

    @property
    def config(self) -> Any:
        return self.module.config

    def global_name(self, name: str) -> str:
        """A parameter's name in the whole model: block i of this part is block start + i there."""
        start = self.plan.blocks(self.name).start
        pattern = rf"(^|\.)({re.escape(self.family.blocks)})\.(\d+)\."
        return re.sub(pattern, lambda m: f"{m[1]}{m[2]}.{int(m[3]) + start}.", name, count=1)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in the whole model."""
        return {self.global_name(name): p for name, p in self.module.named_parameters()}

    def embed(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        weights: Mapping[str, Tensor] | None = None,
        caches: Sequence[RowCache] | None = None,
    ) -> Tensor:
        """Head only. input_ids (T,) int64, rows end to end; hidden (T, d). The rest as in `forward`."""
        return self._blocks(lengths, weights, caches, input_ids=input_ids.unsqueeze(0))

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks' frozen weights; adapters may have another."""
        found: torch.dtype = next(p for p in self.module.parameters() if not p.is_meta).dtype
        return found

    def forward(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        weights: Mapping[str, Tensor] | None = None,
        caches: Sequence[RowCache] | None = None,
    ) -> Tensor:
        """Trunk only. hidden (T, d), rows end to end, to hidden (T, d).

        `weights`: what to use in place of parameters of the base model, by their names there. `caches`: one a row, of
        the tokens before these; these are added.
        """
        return self._blocks(lengths, weights, caches, inputs_embeds=hidden.unsqueeze(0))

    def logits(
        self, hidden: Tensor, lengths: Sequence[int], at: Tensor, caches: Sequence[RowCache] | None = None
    ) -> Tensor:
        """Tail only. hidden (T, d) to logits (P, vocabulary) at the P packed positions `at` (int64)."""
        output = self.module(
            inputs_embeds=hidden.unsqueeze(0), logits_to_keep=at, **self._packed(lengths, hidden.device, caches)
        )
        result: Tensor = output.logits[0]
        return result

    def _blocks(
        self,
        lengths: Sequence[int],
        weights: Mapping[str, Tensor] | None,
        caches: Sequence[RowCache] | None,
        **inputs: Tensor,
    ) -> Tensor:
        arguments = inputs | self._packed(lengths, next(iter(inputs.values())).device, caches)
        output: BaseModelOutputWithPast = (
            self.base(**arguments) if weights is None else functional_call(self.base, dict(weights), (), arguments)
        )
        assert output.last_hidden_state is not None
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _packed(
        self, lengths: Sequence[int], device: torch.device, caches: Sequence[RowCache] | None
    ) -> dict[str, Any]:
        positions = position_ids(lengths, device, caches, self.first_position)
        return {"position_ids": positions, "attention_mask": row_mask(lengths, device, caches), "use_cache": False}


def load_part(
    checkpoint: Checkpoint, plan: SplitPlan, name: PartName, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Part:
    """Build one part and read its tensors, and no others, in `dtype`, or draw them anew. Raises ModelError."""
    part = empty_part(checkpoint.config, plan, name)
    if checkpoint.drawn_from is not None:
        _draw(part, checkpoint, dtype, device)
        return part
    wanted = {_stored_name(checkpoint, part, local): local for local in _own_tensors(part)}
    for stored, tensor in checkpoint.read(wanted):
        _fill(part.module, wanted[stored], tensor, dtype, device, checkpoint)
    _move_buffers(part, device)
    return part


def _draw(part: Part, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
    """First values from the checkpoint's seed: those that the whole model would have under the same names."""
    assert checkpoint.drawn_from is not None
    names = {local: part.global_name(local) for local in _own_tensors(part)}
    draw_weights(part.module, empty_whole(checkpoint.config), names, checkpoint.drawn_from)
    for local in names:
        owner, _, leaf = local.rpartition(".")
        drawn = getattr(part.module.get_submodule(owner), leaf)
        setattr(part.module.get_submodule(owner), leaf, nn.Parameter(drawn.detach().to(device, dtype)))
    _move_buffers(part, device)


def empty_whole(config: Any) -> Any:
    """The whole model without its weights."""
    with _NoWeights():
        return AutoModelForCausalLM.from_config(config)


def _move_buffers(part: Part, device: str) -> None:
    for owner in part.module.modules():
        for leaf, buffer in owner.named_buffers(recurse=False):
            setattr(owner, leaf, buffer.to(device))


def load_head_and_tail(
    checkpoint: Checkpoint, plan: SplitPlan, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Part, Part]:
    """The client's two parts; with tied embeddings they share one parameter, as in the whole model."""
    head = load_part(checkpoint, plan, "head", dtype=dtype, device=device)
    tail = load_part(checkpoint, plan, "tail", dtype=dtype, device=device)
    if checkpoint.config.tie_word_embeddings:
        tie(head, tail)
    return head, tail


def tie(head: Part, tail: Part) -> None:
    """Let the tail's output layer use the head's embedding: one parameter."""
    tail.module.get_output_embeddings().weight = getattr(head.base, head.family.embedding).weight


def empty_part(config: Any, plan: SplitPlan, name: PartName) -> Part:
    """The part without its weights: large parameters on the meta device, buffers real. Raises ModelError."""
    family = family_of(config)
    blocks = plan.blocks(name)
    part_config = sliced_config(config, blocks.start, blocks.stop)
    # GPT-Neo knows no attention interface; its attention is replaced below.
    implementation = "eager" if family.model_type == "gpt_neo" else IMPLEMENTATION
    with _NoWeights():
        module = AutoModelForCausalLM.from_config(part_config, attn_implementation=implementation)
    base = getattr(module, module.base_model_prefix)
    if name != "head":
        setattr(base, family.embedding, Absent())
        if family.positions:
            setattr(base, family.positions, NoPositions())
        if family.embedding_dropout:
            setattr(base, family.embedding_dropout, nn.Identity())
    if name != "tail":
        setattr(base, family.final_norm, nn.Identity())
        module.set_output_embeddings(Absent())
    if family.model_type == "gpt_neo":
        for block in base.h:
            _pack_gpt_neo_attention(block.attn.attention, config.window_size)
    return Part(name, module, family, plan)


def _pack_gpt_neo_attention(attention: Any, window_size: int) -> None:
    window = window_size if attention.attention_type == "local" else None
    attention.layer_idx = attention.layer_id
    attention.bias = None  # a (context, context) mask that packed attention does not read

    def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:
        dropout = attention.attn_dropout.p if attention.training else 0.0
        output, _ = packed_attention(
            attention, query, key, value, attention_mask, scaling=1.0, dropout=dropout, sliding_window=window
        )
        return output.transpose(1, 2), None

    attention._attn = attend


class _NoWeights(TorchFunctionMode):
    """While it is on, `torch.empty`, which makes all weights worth mentioning, allocates nothing.

    Buffers come from other functions and are made. In this thread alone: a patch of nn.Module would reach others.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


def _own_tensors(part: Part) -> list[str]:
    """Local names of the tensors to read. The tail of a tied model takes its output weights from the head instead."""
    output = part.module.get_output_embeddings()
    tied = part.name == "tail" and part.config.tie_word_embeddings
    return [name for name, parameter in part.module.named_parameters() if not (tied and output.weight is parameter)]


def _stored_name(checkpoint: Checkpoint, part: Part, local: str) -> str:
    """The name under which the checkpoint keeps a parameter: ours, without the base prefix, or an old alias."""
    name = part.global_name(local)
    prefix = part.module.base_model_prefix + "."
    for candidate in (name, name.removeprefix(prefix), part.family.aliases.get(name, name)):
        if candidate in checkpoint.files:
            return candidate
    raise ModelError(f"{checkpoint.name_or_path}: the checkpoint has no tensor {name}")


def _fill(
    module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: str, checkpoint: Checkpoint
) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    expected = getattr(owner, leaf).shape
    if tensor.shape != expected:
        raise ModelError(
            f"{checkpoint.name_or_path}: tensor {name} has shape {tuple(tensor.shape)}, the configuration says "
            f"{tuple(expected)}"
        )
    # A copy of its own: what was read may be a view of the mapped file.
    copy = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
    setattr(owner, leaf, nn.Parameter(copy))
