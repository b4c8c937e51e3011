"""Random values that depend on a seed and a name alone: the same wherever, and in whatever order, they are drawn."""

import hashlib

import torch


def generator_of(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the tensor of that name in the whole model."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
