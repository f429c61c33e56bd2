"""Initialisers: name -> how A and B begin. In all but `False` the product B A is zero, so step 0 equals the base model.

Shapes: A (R, I), B (O, R).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def _uniform(rows: int, columns: int, fan_in: int, generator: torch.Generator) -> Tensor:
    """Kaiming uniform with a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as nn.Linear begins (He et al. 2015)."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def kaiming(rank: int, inputs: int, outputs: int, generator: torch.Generator) -> Pair:
    """A random, B zero: the LoRA paper's way as PEFT does it."""
    return _uniform(rank, inputs, inputs, generator), torch.zeros(outputs, rank)


def both_random(rank: int, inputs: int, outputs: int, generator: torch.Generator) -> Pair:
    """A and B random: for tests of an adapter that is not the identity."""
    return _uniform(rank, inputs, inputs, generator), _uniform(outputs, rank, rank, generator)


def gaussian(rank: int, inputs: int, outputs: int, generator: torch.Generator) -> Pair:
    """A ~ N(0, (1/r)^2), B zero, as PEFT's "gaussian"."""
    return torch.empty(rank, inputs).normal_(std=1 / rank, generator=generator), torch.zeros(outputs, rank)


def embedding(rank: int, inputs: int, outputs: int, generator: torch.Generator) -> Pair:
    """A zero, B ~ N(0, 1): PEFT's way for embeddings, where each input picks one column of A."""
    return torch.zeros(rank, inputs), torch.empty(outputs, rank).normal_(generator=generator)


INITS: dict[bool | str, Callable[[int, int, int, torch.Generator], Pair]] = {
    True: kaiming,
    False: both_random,
    "gaussian": gaussian,
}
