"""Spectra and subspaces of updates, against dense float64 algebra."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.adapter.adapter import Adapter
from loratune.adapter.analysis import (
    amplification,
    decomposition,
    effective_rank,
    frobenius_norm,
    similarities,
    similarity_grid,
    singular_values,
    spectra,
    subspace_similarity,
)
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.errors import AdapterError, ConfigError
from oracles import relative


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(outputs: int = 12, inputs: int = 10, rank: int = 3, scale: float = 0.7, seed: int = 0) -> LowRank:
    return LowRank(random(rank, inputs, seed=seed), random(outputs, rank, seed=seed + 1), scale)


@settings(deadline=None, max_examples=40)
@given(outputs=st.integers(1, 12), inputs=st.integers(1, 12), rank=st.integers(1, 14), scale=st.floats(0.01, 10))
def test_the_decomposition_is_that_of_the_full_update(outputs: int, inputs: int, rank: int, scale: float) -> None:
    """Ranks above the sizes included."""
    lora = factor(outputs, inputs, rank, scale, seed=outputs + 20 * inputs)
    U, S, Vt = decomposition(lora)
    smallest = min(outputs, inputs, rank)
    assert (U.shape, S.shape, Vt.shape) == ((outputs, smallest), (smallest,), (smallest, inputs))
    assert relative((U * S) @ Vt, lora.delta()) < 1e-12
    assert torch.allclose(U.T @ U, torch.eye(smallest, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(Vt @ Vt.T, torch.eye(smallest, dtype=torch.float64), atol=1e-12)
    assert relative(singular_values(lora), torch.linalg.svdvals(lora.delta())[:smallest]) < 1e-12
    assert frobenius_norm(lora) == pytest.approx(float(lora.delta().norm()))


def test_a_convolution_counts_as_its_flat_matrix() -> None:
    lora = LowRank(random(2, 5, 3, 3), random(6, 2, 1, 1), 1.5)
    dense = 1.5 * (lora.B.flatten(1) @ lora.A.flatten(1))
    assert relative(singular_values(lora), torch.linalg.svdvals(dense.detach())[:2]) < 1e-13


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 1, 1, 1], 4.0), ([5.0, 0, 0], 1.0), ([0.0, 0], 0.0), ([3.0, 1], 4 / 3**0.75)],
)
def test_effective_rank_counts_directions(values: list[float], expected: float) -> None:
    """(3, 1): p = 3/4, 1/4; exp(-sum p log p) = 4 / 3^(3/4)."""
    assert effective_rank(torch.tensor(values)) == pytest.approx(expected)


def test_spectra_are_per_site() -> None:
    factors = {"q": factor(), "v": factor(7, seed=5)}
    found = spectra(Adapter(LoraConfig(target_modules=["q", "v"]), factors))
    for path, lora in factors.items():
        dense = torch.linalg.svdvals(lora.delta())[:3]
        assert relative(found[path].singular_values, dense) < 1e-13
        assert found[path].frobenius_norm == pytest.approx(float(lora.delta().norm()))
        assert 1 < found[path].effective_rank <= 3


def test_similarity_is_equation_4_of_the_paper() -> None:
    one, two = factor(rank=3), factor(rank=5, seed=9)
    U1, U2 = (torch.linalg.svd(lora.A.detach()).Vh.T for lora in (one, two))  # right singular vectors as columns
    for i in range(1, 4):
        for j in range(1, 6):
            expected = float((U1[:, :i].T @ U2[:, :j]).square().sum()) / min(i, j)
            assert subspace_similarity(one, two, i, j) == pytest.approx(expected, abs=1e-13)
            assert 0 <= expected <= 1 + 1e-12
            assert subspace_similarity(two, one, j, i) == pytest.approx(expected, abs=1e-13)


def test_similarity_is_1_for_one_span_and_0_for_orthogonal_ones() -> None:
    one = factor(inputs=10, rank=3)
    mixed = LowRank(random(3, 3, seed=4) @ one.A.detach(), one.B.detach(), 1.0)  # another basis of the same span
    assert subspace_similarity(one, mixed, 3, 3) == pytest.approx(1.0)
    assert torch.allclose(similarity_grid(one, one).diagonal(), torch.ones(3, dtype=torch.float64))
    left, right = torch.zeros(2, 10), torch.zeros(2, 10)
    left[0, 0] = left[1, 1] = right[0, 2] = right[1, 3] = 1.0
    apart = similarity_grid(LowRank(left, torch.ones(4, 2), 1.0), LowRank(right, torch.ones(4, 2), 1.0))
    assert not apart.any()


def test_similarities_are_per_shared_site() -> None:
    config = LoraConfig(target_modules=["q"])
    one = Adapter(config, {"q": factor(), "v": factor(seed=3)})
    two = Adapter(config, {"v": factor(seed=3), "k": factor(seed=4)})
    assert similarities(one, two, 2, 2) == {"v": pytest.approx(1.0)}
    with pytest.raises(AdapterError, match="share no site; first sites: q, k"):
        similarities(Adapter(config, {"q": factor()}), Adapter(config, {"k": factor()}), 1, 1)


@pytest.mark.parametrize(("i", "j", "name"), [(0, 1, "i is 0"), (4, 1, "i is 4"), (1, 6, "j is 6; expected 1 to 5")])
def test_indices_beyond_the_rank_are_refused(i: int, j: int, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        subspace_similarity(factor(rank=3), factor(rank=5), i, j)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(AdapterError, match="10 and 9 inputs"):
        similarity_grid(factor(inputs=10), factor(inputs=9))
    with pytest.raises(AdapterError, match=r"W is \(10, 12\); expected \(outputs, inputs\) = \(12, 10\)"):
        amplification(factor(), random(10, 12))


def test_amplification_is_that_of_section_7_3() -> None:
    lora, W = factor(), random(12, 10, seed=7)
    U, _, Vt = torch.linalg.svd(lora.delta())
    inside = U[:, :3].T @ W @ Vt[:3].T
    assert amplification(lora, W) == pytest.approx(float(lora.delta().norm() / inside.norm()))


def test_amplification_of_a_known_update() -> None:
    """W has 2 in the one direction that dW = 6 e0 e0^T has: 6 / 2. The rest of W does not count, nor does a rank too
    large for the update."""
    W = torch.diag(torch.tensor([2.0, 50.0, 70.0]))
    A, B = torch.zeros(2, 3), torch.zeros(3, 2)
    A[0, 0], B[0, 0] = 3.0, 1.0
    assert amplification(LowRank(A, B, 2.0), W) == pytest.approx(3.0)
    W[0, 0] = 0.0
    assert amplification(LowRank(A, B, 2.0), W) == math.inf
    assert amplification(LowRank(A, torch.zeros(3, 2), 2.0), W) == 0.0


def test_a_direction_that_is_only_rounding_does_not_count_in_the_amplification() -> None:
    A, B, W = random(1, 7), random(5, 1, seed=1), random(5, 7, seed=2)
    twice = LowRank(
        torch.cat([A, A + 4e-16 * random(1, 7, seed=3)]), torch.cat([B, B], 1), 0.5
    )  # rank 2 by its shape, 1 in truth
    assert amplification(twice, W) == pytest.approx(amplification(LowRank(A, B, 1.0), W), rel=1e-9)


def test_an_update_where_the_weight_has_nothing_is_amplified_without_end() -> None:
    factor = LowRank(random(2, 7) / 100, random(5, 2, seed=1) / 100, 1.0)
    assert amplification(factor, torch.zeros(5, 7)) == math.inf
    assert amplification(LowRank(factor.A.detach(), torch.zeros(5, 2), 1.0), torch.zeros(5, 7)) == 0.0
