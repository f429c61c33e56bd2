"""The label loss against torch's cross-entropy, and its hand-written gradients against finite differences."""

import time
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.model import loss
from loratune.model.loss import HeadShape, label_log_probs, label_loss, loss_memory
from oracles import relative


class Case(NamedTuple):
    """A head: which optional inputs it has, and its shape."""

    bias: bool = False
    adapted: bool = False
    shape: HeadShape = HeadShape()


_CASES = {
    "plain": Case(),
    "bias": Case(bias=True),
    "adapted": Case(adapted=True, shape=HeadShape(lora_scale=1.7)),
    "softcap": Case(shape=HeadShape(softcap=2.0)),
    "scale": Case(shape=HeadShape(logit_scale=0.3)),
    "all": Case(True, True, HeadShape(0.6, 2.0, 1.7)),
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def inputs_of(case: Case, rows: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """(h, labels, W, bias, z, B), every tensor but the labels requiring grad."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(0, 7, (rows,), generator=generator)
    bias, z, B = leaf(7), leaf(rows, 2), leaf(7, 2)
    h, W = leaf(rows, 4), leaf(7, 4)
    return h, labels, W, bias if case.bias else None, z if case.adapted else None, B if case.adapted else None


def plain(inputs: Inputs, shape: HeadShape) -> Tensor:
    """Each row's loss by torch's own functions."""
    h, labels, W, bias, z, B = inputs
    logits = h @ W.T
    logits = logits if bias is None else logits + bias
    logits = logits if z is None or B is None else logits + shape.lora_scale * z @ B.T
    logits = logits * shape.logit_scale
    logits = logits if shape.softcap is None else shape.softcap * torch.tanh(logits / shape.softcap)
    return F.cross_entropy(logits, labels, reduction="none")


def sum_of(h: Tensor, labels: Tensor, W: Tensor, bias: Tensor | None, z: Tensor | None, B: Tensor | None,
           shape: HeadShape, weight: float = 1.0) -> Tensor:  # fmt: skip
    return label_loss(h, labels, W, bias, z, B, shape)[0] * weight


@pytest.mark.parametrize("name", _CASES)
def test_gradients_equal_finite_differences(name: str) -> None:
    inputs = inputs_of(_CASES[name])
    assert torch.autograd.gradcheck(sum_of, (*inputs, _CASES[name].shape, 0.3))


@pytest.mark.parametrize("name", _CASES)
def test_gradients_of_each_rows_log_probability_equal_finite_differences(name: str) -> None:
    inputs = inputs_of(_CASES[name])
    assert torch.autograd.gradcheck(lambda *given: label_log_probs(*given), (*inputs, _CASES[name].shape))


@given(
    case=st.sampled_from(sorted(_CASES)), rows=st.integers(1, 40), block=st.sampled_from([1, 3, 16, 256]),
    chunk=st.sampled_from([1, 2, 3, 7, 100]), learns=st.booleans(), seed=st.integers(0, 9), with_memory=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_equal_torch_for_any_number_of_rows_blocks_and_chunks(
    case: str, rows: int, block: int, chunk: int, learns: bool, seed: int, with_memory: bool
) -> None:
    """With a head that learns, and with one that is frozen, whose vocabulary is taken in chunks."""
    inputs, shape = inputs_of(_CASES[case], rows, seed=seed), _CASES[case].shape
    if not learns:
        for head in (inputs[2], inputs[3], inputs[5]):
            if head is not None:
                head.requires_grad_(False)
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    memory = loss_memory(inputs[2].detach()) if with_memory else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "BLOCK_ROWS", block)
        patch.setattr(loss, "WHOLE_ROWS", block)
        patch.setattr(loss, "CHUNK", chunk)
        total, each = label_loss(*inputs, shape, memory)
        found = torch.autograd.grad(total, leaves)
        log_probs = label_log_probs(*inputs, shape, memory)
    expected = plain(inputs, shape)
    assert relative(each, expected) < 1e-13 and not each.requires_grad
    assert float(total) == pytest.approx(float(expected.detach().sum()), rel=1e-13)
    for mine, theirs in zip(found, torch.autograd.grad(expected.sum(), leaves, retain_graph=True), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-13)
    # Any function of the rows' own log-probabilities; a preference's looks like this.
    preference = torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.autograd.grad(F.softplus(preference @ log_probs), leaves)
    assert relative(log_probs, -expected) < 1e-13
    for mine, theirs in zip(found, torch.autograd.grad(F.softplus(-preference @ expected), leaves), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-13)


def test_only_what_requires_grad_gets_one() -> None:
    inputs = inputs_of(_CASES["all"])
    h, labels, W, bias, z, B = inputs
    W.requires_grad_(False)
    label_loss(h, labels, W, bias.detach() if bias is not None else None, z, B, _CASES["all"].shape)[0].backward()
    assert W.grad is None and bias is not None and bias.grad is None
    assert h.grad is not None and z is not None and z.grad is not None and B is not None and B.grad is not None


def test_without_grad_it_is_the_value_alone() -> None:
    inputs, shape = inputs_of(_CASES["all"]), _CASES["all"].shape
    with torch.no_grad():
        total, _ = label_loss(*inputs, shape)
    assert not total.requires_grad and float(total) == pytest.approx(float(plain(inputs, shape).sum()), rel=1e-13)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_extreme_logits_stay_finite_and_right(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp of a logit of 1000 overflows; the largest is taken off first, also where it turns up late."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    h = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    W = torch.tensor([[1.0], [0.0], [-1.0]])
    total, each = label_loss(h, torch.tensor([2, 2]), W)
    assert each.tolist() == [2000.0, 0.0]
    total.backward()
    assert h.grad is not None and h.grad.tolist() == [[2.0], [0.0]]


def test_a_model_that_is_sure_costs_no_more_than_one_that_is_not() -> None:
    """Logits that lie 95 below the highest: e^-95 is a denormal number in float32, slow to compute and to multiply."""

    def seconds(gap: float) -> float:
        h, W = torch.ones(64, 64, requires_grad=True), torch.full((4096, 64), -gap / 64)
        W[0] = 0
        found: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            label_loss(h, torch.zeros(64, dtype=torch.int64), W)[0].backward()
            found.append(time.perf_counter() - start)
        return min(found)

    assert seconds(95.0) < 5 * seconds(20.0)  # fifty times, were they not left out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_inputs_allow(dtype: torch.dtype) -> None:
    """Losses come out in float32; the error is that of rounding the logits once."""
    inputs = inputs_of(_CASES["all"], rows=64, dtype=dtype)
    total, each = label_loss(*inputs, _CASES["all"].shape)
    wide = tuple(None if x is None else x.detach().double() if x.is_floating_point() else x for x in inputs)
    epsilon = torch.finfo(dtype).eps
    assert each.dtype == torch.float32
    assert torch.allclose(each.double(), plain(wide, _CASES["all"].shape), atol=16 * epsilon)  # type: ignore[arg-type]
    total.backward()
    assert inputs[0].grad is not None and inputs[0].grad.dtype == dtype


def test_adding_up_two_backward_passes_doubles_the_gradient() -> None:
    inputs, shape = inputs_of(_CASES["all"]), _CASES["all"].shape
    memory = loss_memory(inputs[2].detach())
    first = label_loss(*inputs, shape, memory)[0]
    second = label_loss(*inputs, shape, memory)[0]  # the same memory, before the first backward
    first.backward()
    once = inputs[0].grad.clone()  # type: ignore[union-attr]
    second.backward()
    assert torch.equal(inputs[0].grad, 2 * once)  # type: ignore[arg-type]
