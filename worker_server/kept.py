"""Forwards that wait for their gradients: what is kept of them, and what is computed again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One client's rows in a cohort: hidden (T, d) float32, row lengths, target tokens of its step, whether it wants a
    gradient.

    `client`: its name, by which per-client adapters are told apart.
    """

    hidden: Tensor
    lengths: tuple[int, ...]
    target_tokens: int
    wants_gradient: bool
    client: str = ""

    @property
    def tokens(self) -> int:
        return len(self.hidden)


@dataclass(frozen=True)
class Graph:
    """One packed forward: the trunk's input and output leaves, (T, d) each, and the places in the cohort of its rows.

    `own`: with per-client adapters, the weights of each of them, (rows, P), a leaf.
    """

    places: tuple[int, ...]
    hidden: Tensor
    output: Tensor
    own: Tensor | None = None

    def rows(self, forward: "Forward") -> list[Rows]:
        return [forward.rows[place] for place in self.places]


@dataclass
class Forward:
    """A cohort's forward: its inputs, what its parameters were, and its graphs while they are kept.

    `weights`: the trained parameters by name in the module, or None where they are the module's own and will be the
    same in the backward; `own`: each row's per-client adapter, (rows, P), where there are such. `random`: the random
    state before the forward, where it drew (dropout).
    """

    rows: Sequence[Rows]
    weights: Mapping[str, Tensor] | None = None
    own: Tensor | None = None
    random: Tensor | None = None
    graphs: list[Graph] | None = None

    @property
    def tokens(self) -> int:
        return sum(rows.tokens for rows in self.rows)


def release_oldest(forwards: Mapping[int, Forward], max_kept_tokens: int) -> list[int]:
    """Let go of the oldest graphs until at most `max_kept_tokens` tokens are in graphs; the numbers of these."""
    kept = [number for number, forward in forwards.items() if forward.graphs is not None]
    excess = sum(forwards[number].tokens for number in kept) - max_kept_tokens
    released: list[int] = []
    for number in kept:
        if excess <= 0:
            break
        forwards[number].graphs = None
        excess -= forwards[number].tokens
        released.append(number)
    return released


def random_state(device: str) -> Tensor:
    """The state of the generator that dropout on `device` draws from."""
    return torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.get_rng_state()


def set_random_state(state: Tensor, device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
