"""Initialisers: name -> how A and B begin.

Where B A does not begin at zero, its beginning (A0, B0) is kept and subtracted: the update is s (B A - B0 A0), so that
step 0 equals the base model and the base weight is not touched (PEFT changes it: W := W - s B0 A0). What is saved is
plain LoRA of rank 2 R. Shapes: A (R, *inputs), B (O, R), W (O, I).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.errors import ConfigError

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Begin:
    """What an initialiser may look at. weight: the frozen weight as (O, I), None where it cannot be decomposed."""

    rank: int
    inputs: tuple[int, ...]
    outputs: int
    scale: float
    generator: torch.Generator
    weight: Tensor | None = None


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Kaiming uniform with a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as nn.Linear begins (He et al. 2015)."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def kaiming(begin: Begin) -> Pair:
    """A random, B zero: the LoRA paper's way as PEFT does it."""
    A = _uniform((begin.rank, *begin.inputs), math.prod(begin.inputs), begin.generator)
    return A, torch.zeros(begin.outputs, begin.rank)


def both_random(begin: Begin) -> Pair:
    """A and B random: for tests of an adapter that is not the identity."""
    return kaiming(begin)[0], _uniform((begin.outputs, begin.rank), begin.rank, begin.generator)


def gaussian(begin: Begin) -> Pair:
    """A ~ N(0, (1/r)^2), B zero, as PEFT's "gaussian"."""
    A = torch.empty(begin.rank, *begin.inputs).normal_(std=1 / begin.rank, generator=begin.generator)
    return A, torch.zeros(begin.outputs, begin.rank)


def embedding(begin: Begin) -> Pair:
    """A zero, B ~ N(0, 1): PEFT's way for embeddings, where each input picks one column of A."""
    B = torch.empty(begin.outputs, begin.rank).normal_(generator=begin.generator)
    return torch.zeros(begin.rank, *begin.inputs), B


def orthogonal(begin: Begin) -> Pair:
    """Rows of A and columns of B in orthogonal halves of one random basis of R^r, so that B A = 0; r must be even."""
    if begin.rank % 2:
        raise ConfigError(f'init_lora_weights="orthogonal" needs an even rank; found {begin.rank}.')
    basis, _ = torch.linalg.qr(torch.empty(begin.rank, begin.rank).normal_(generator=begin.generator))
    inputs = math.prod(begin.inputs)
    left = torch.empty(inputs, begin.rank // 2).normal_(generator=begin.generator) @ basis[0::2]
    right = torch.empty(begin.outputs, begin.rank // 2).normal_(generator=begin.generator) @ basis[1::2]
    return (left.T / 10).reshape(begin.rank, *begin.inputs).contiguous(), (right / 10).contiguous()


def pissa(begin: Begin) -> Pair:
    """The r leading singular directions of W, sqrt(S / s) in each half (Meng et al. 2024, arXiv 2404.02948)."""
    U, S, Vh = torch.linalg.svd(_weight(begin, "pissa"), full_matrices=False)
    return _split(U, S, Vh, begin)


def pissa_niter(begin: Begin, niter: int) -> Pair:
    """PiSSA by the randomised decomposition of Halko et al. 2011 with `niter` subspace iterations."""
    U, S, V = torch.svd_lowrank(_weight(begin, "pissa"), q=begin.rank, niter=niter)
    return _split(U, S, V.T, begin)


def _split(U: Tensor, S: Tensor, Vh: Tensor, begin: Begin) -> Pair:
    root = (S[: begin.rank] / begin.scale).sqrt()
    return root[:, None] * Vh[: begin.rank], U[:, : begin.rank] * root


def olora(begin: Begin) -> Pair:
    """The first r columns of Q and rows of R of W = Q R (Bueyuekakyuez 2024, arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(_weight(begin, "olora"))
    return R[: begin.rank].contiguous(), Q[:, : begin.rank].contiguous()


def _weight(begin: Begin, name: str) -> Tensor:
    if begin.weight is None or len(begin.inputs) != 1 or begin.rank > min(begin.weight.shape):
        raise ConfigError(
            f"init_lora_weights={name!r} needs a linear layer with r up to its smaller side; found r={begin.rank} on a "
            f"weight with rows {begin.inputs} and {begin.outputs} outputs."
        )
    return begin.weight.detach().float()


INITS: dict[bool | str, Callable[[Begin], Pair]] = {
    True: kaiming,
    False: both_random,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}
DECOMPOSING = ("pissa", "olora")  # their beginnings are subtracted again


def initialiser(name: bool | str) -> Callable[[Begin], Pair] | None:
    """Returns the initialiser of a name, "pissa_niter_N" included; None for an unknown one."""
    if isinstance(name, str) and name.startswith("pissa_niter_") and name[12:].isdigit():
        return lambda begin: pissa_niter(begin, int(name[12:]))
    return INITS.get(name) if isinstance(name, bool | str) else None


def is_subtracted(name: bool | str) -> bool:
    """Whether what a factor begins with is subtracted, because it repeats a part of W."""
    return isinstance(name, str) and name.startswith(DECOMPOSING)
