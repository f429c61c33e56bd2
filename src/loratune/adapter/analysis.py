"""Analysis: what an update s B A looks like, from matrices of its rank only.

Shapes: I inputs, O outputs, R rank, K = min(O, I, R).  A convolution's A (R, I, *k) counts as (R, I k...).
All results are float64 on the CPU, whatever the factors' type. With a DoRA magnitude, s B A is the low-rank part alone.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loratune.adapter.adapter import Adapter
from loratune.adapter.factor import LowRank
from loratune.errors import AdapterError, ConfigError


class Decomposition(NamedTuple):
    """s B A = U diag(S) V^T: U (O, K), S (K,) descending, Vt (K, I)."""

    U: Tensor
    S: Tensor
    Vt: Tensor


@dataclass(frozen=True)
class Spectrum:
    """One site's update: its singular values (K,) descending, their effective rank, and its Frobenius norm."""

    singular_values: Tensor
    effective_rank: float
    frobenius_norm: float


def matrices(factor: LowRank) -> tuple[Tensor, Tensor]:
    """Returns A (R, I) and B (O, R) of a factor as float64 matrices on the CPU, the scale not included."""
    return _double(factor.A).flatten(1), _double(factor.B).flatten(1)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def decompose(A_RI: Tensor, B_OR: Tensor) -> Decomposition:
    """Returns the exact singular value decomposition of B A without forming it.

    A^T = Q_a R_a, B = Q_b R_b, and the core R_b R_a^T (R x R) = U' S V'^T gives U = Q_b U', V^T = V'^T Q_a^T:
    O(R^2 (O + I)) instead of O(O I min(O, I)).
    """
    Qa_IK, Ra_KR = torch.linalg.qr(A_RI.T)
    Qb_OK, Rb_KR = torch.linalg.qr(B_OR)
    U, S, Vt = torch.linalg.svd(Rb_KR @ Ra_KR.T, full_matrices=False)
    return Decomposition(Qb_OK @ U, S, Vt @ Qa_IK.T)


def decomposition(factor: LowRank) -> Decomposition:
    """Returns the singular value decomposition of a factor's s B A."""
    A, B = matrices(factor)
    return decompose(A * factor.scale, B)


def singular_values(factor: LowRank) -> Tensor:
    """Returns the singular values of s B A, (K,), descending."""
    return decomposition(factor).S


def frobenius_norm(factor: LowRank) -> float:
    """Returns ||s B A||_F, the root of the sum of the squared singular values."""
    return float(singular_values(factor).norm())


def effective_rank(values: Tensor) -> float:
    """Returns exp(-sum p log p) with p = values / sum(values): from 1 (one direction) to K (all alike); 0 if all are 0.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    total = float(values.sum())
    if total == 0:
        return 0.0
    return math.exp(float(torch.special.entr(values / total).sum()))


def spectra(adapter: Adapter) -> dict[str, Spectrum]:
    """Returns the spectrum of the update at every site, by module path."""
    found: dict[str, Spectrum] = {}
    for path, factor in adapter.factors.items():
        values = singular_values(factor)
        found[path] = Spectrum(values, effective_rank(values), float(values.norm()))
    return found


def similarity_grid(one: LowRank, other: LowRank) -> Tensor:
    """Returns phi(A1, A2, i, j) = ||U1_i^T U2_j||_F^2 / min(i, j) for all i and j, at [i - 1, j - 1].

    U1_i holds the first i right singular vectors of A1. 1: one span lies in the other; 0: they are orthogonal.
    Raises AdapterError if the inputs' sizes differ. Hu et al. 2021, section 7.2, equation 4.
    """
    (A1, _), (A2, _) = matrices(one), matrices(other)
    if A1.shape[1] != A2.shape[1]:
        raise AdapterError(f"two subspaces of {A1.shape[1]} and {A2.shape[1]} inputs cannot be compared.")
    Vt1, Vt2 = (torch.linalg.svd(A, full_matrices=False).Vh for A in (A1, A2))
    overlaps = (Vt1 @ Vt2.T).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1) for size in overlaps.shape)
    return overlaps / torch.minimum(i[:, None], j[None, :])


def subspace_similarity(one: LowRank, other: LowRank, i: int, j: int) -> float:
    """Returns phi(A1, A2, i, j) of `similarity_grid` for one i and j; raises ConfigError outside 1 to the rank."""
    grid = similarity_grid(one, other)
    for name, index, limit in (("i", i, grid.shape[0]), ("j", j, grid.shape[1])):
        if not 1 <= index <= limit:
            raise ConfigError(f"{name} is {index}; expected 1 to {limit}, the rank of that factor.")
    return float(grid[i - 1, j - 1])


def similarities(one: Adapter, other: Adapter, i: int, j: int) -> dict[str, float]:
    """Returns phi(A1, A2, i, j) at every site that both adapters have; raises AdapterError if there is none."""
    shared = [path for path in one.factors if path in other.factors]
    if not shared:
        raise AdapterError(
            f"the two adapters share no site; first sites: {next(iter(one.factors), None)}, "
            f"{next(iter(other.factors), None)}."
        )
    return {path: subspace_similarity(one.factors[path], other.factors[path], i, j) for path in shared}


def amplification(factor: LowRank, weight: Tensor) -> float:
    """Returns ||dW||_F / ||U^T W V||_F for dW = s B A = U S V^T: how much dW amplifies what W has in its directions.

    weight: W as (O, I), or (O, I, *k); a weight stored (I, O) must be transposed. Directions of singular value 0 are
    left out; 0 if dW is 0, infinity if W has nothing there. Raises AdapterError on other shapes.
    Hu et al. 2021, section 7.3, table 4.
    """
    U, S, Vt = decomposition(factor)
    W = _double(weight).flatten(1)
    if W.shape != (U.shape[0], Vt.shape[1]):
        raise AdapterError(f"W is {tuple(W.shape)}; expected (outputs, inputs) = {(U.shape[0], Vt.shape[1])}.")
    negligible = S[0] * max(W.shape) * torch.finfo(S.dtype).eps
    rank = int(S.gt(negligible).sum())
    inside, update = float((U[:, :rank].T @ W @ Vt[:rank].T).norm()), float(S.norm())
    if inside == 0:
        return math.inf if update > 0 else 0.0
    return update / inside
