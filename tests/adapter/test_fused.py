"""The fused layer: its hand-written gradients against finite differences, and against the plain path of autograd."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.adapter.dropout import Mask
from loratune.adapter.factor import LowRank
from loratune.adapter.fused import Linear, lora_linear
from loratune.adapter.hosts import host_of
from oracles import relative


def layer(kind: str, bias: bool, inputs: int = 5, outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    module = Conv1D(outputs, inputs) if kind == "Conv1D" else nn.Linear(inputs, outputs, bias)
    nn.init.normal_(module.weight)
    if module.bias is not None:
        nn.init.normal_(module.bias)
    return module.double().requires_grad_(False)


def factor_of(dropout: float, inputs: int = 5, outputs: int = 4) -> LowRank:
    torch.manual_seed(1)
    return LowRank(torch.randn(3, inputs).double(), torch.randn(outputs, 3).double(), 1.7, dropout)


def mask_of(keep: Tensor | None, factor: LowRank) -> Mask | None:
    return None if keep is None else Mask(~keep, 0, keep.shape[1], factor.dropout, keep.device)


def written_out(module: Any, factor: LowRank, x: Tensor, keep: Tensor | None) -> Tensor:
    """y = W x + b + s B A (m x / (1 - p)), by autograd."""
    W = module.weight if isinstance(module, nn.Linear) else module.weight.T
    dropped = x if keep is None else x * keep.view_as(x) / (1 - factor.dropout)
    y = x @ W.T + factor.scale * (dropped @ factor.A.T) @ factor.B.T
    return y if module.bias is None else y + module.bias


_KINDS = [("Linear", True), ("Linear", False), ("Conv1D", True)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("kind", "bias"), _KINDS)
def test_gradients_equal_finite_differences(kind: str, bias: bool, dropout: float) -> None:
    module, factor = layer(kind, bias), factor_of(dropout)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(6, 5) >= dropout if dropout else None

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:  # A and B are the factor's own, moved in place
        assert A is factor.A and B is factor.B
        return lora_linear(Linear(module, host, factor, mask_of(keep, factor)), x)

    host = host_of(module)
    assert host is not None
    assert torch.autograd.gradcheck(function, (x, factor.A, factor.B))


@given(
    kind=st.sampled_from(_KINDS), lead=st.lists(st.integers(1, 4), max_size=3), dropout=st.sampled_from([0.0, 0.3]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape_and_any_set_of_wanted_gradients_equals_autograd(
    kind: tuple[str, bool], lead: list[int], dropout: float, needs: tuple[bool, bool, bool], seed: int
) -> None:
    module, factor = layer(*kind), factor_of(dropout)
    torch.manual_seed(seed)
    x = torch.randn(*lead, 5, dtype=torch.float64)
    keep = torch.rand(x.numel() // 5, 5) >= dropout if dropout else None
    leaves = (x, factor.A, factor.B)
    wanted = [leaf.requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True) if need]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    host = host_of(module)
    assert host is not None
    found, expected = (
        lora_linear(Linear(module, host, factor, mask_of(keep, factor)), x),
        written_out(module, factor, x, keep),
    )
    assert found.shape == (*lead, 4) and relative(found, expected) < 1e-13
    weight = torch.randn(found.shape, dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), wanted)
    for mine, theirs in zip(ours, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-13)


def test_the_frozen_weight_and_the_input_are_not_written() -> None:
    module, factor = layer("Linear", True), factor_of(0.0)
    before = [module.weight.clone(), module.bias.clone()]
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    kept = x.detach().clone()
    host = host_of(module)
    assert host is not None
    lora_linear(Linear(module, host, factor, None), x).square().sum().backward()
    assert torch.equal(x, kept) and torch.equal(module.weight, before[0]) and torch.equal(module.bias, before[1])
    assert module.weight.grad is None


def test_an_in_place_addition_may_follow() -> None:
    """Falcon adds its residual in place; a function that returned a view would refuse that."""
    module, factor = layer("Linear", True), factor_of(0.0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    host = host_of(module)
    assert host is not None
    y = lora_linear(Linear(module, host, factor, None), x)
    y += 1
    y.sum().backward()
    assert x.grad is not None


def test_a_bfloat16_base_keeps_float32_factors_and_gradients() -> None:
    module, factor = layer("Linear", True, 64, 48), factor_of(0.0, 64, 48)
    exact_x = torch.randn(32, 64)
    x = exact_x.bfloat16().requires_grad_()
    wide = x.detach().double()
    expected = written_out(module, factor, wide, None)
    (expected * 0.1).sum().backward()
    expected_A = factor.A.grad
    assert expected_A is not None
    half, narrow = module.bfloat16(), LowRank(factor.A.detach().float(), factor.B.detach().float(), factor.scale)
    host = host_of(half)
    assert host is not None
    found = lora_linear(Linear(half, host, narrow, None), x)
    (found * 0.1).sum().backward()
    assert found.dtype == torch.bfloat16 and relative(found.double(), expected) < 2**-6
    assert narrow.A.grad is not None and narrow.A.grad.dtype == torch.float32
    assert relative(narrow.A.grad.double(), expected_A) < 2**-6
