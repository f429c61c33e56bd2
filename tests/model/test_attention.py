"""Packed attention against softmax written out in loops of documents, and padded batches against transformers' own."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from families import FAMILIES, inputs_for
from loratune.model import attention
from loratune.model.prefixes import Segment
from oracles import logits_of, relative


def written_out(
    q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], scale: float, causal: bool, window: int | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """(1, T, Q, D): one query at a time, over the keys that it may see."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(1, q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype)
    for start, end in pairwise(boundaries):
        for t in range(start, end):
            seen = [s for s in range(start, end) if (s <= t or not causal) and (window is None or abs(t - s) < window)]
            for head in range(q.shape[1]):
                scores = k[0, head // groups, seen] @ q[0, head, t] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                top = scores.exp()
                total = top.sum() + (0 if sinks is None else sinks[head].exp())
                out[0, t, head] = (top / total) @ v[0, head // groups, seen]
    return out


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 3, 100]),
    causal=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_packed_attention_equals_softmax_written_out(
    lengths: list[int], window: int | None, causal: bool, softcap: float | None, with_sinks: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    boundaries = (0, *torch.tensor(lengths).cumsum(0).tolist())
    q = torch.randn(1, 4, num_tokens, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    k = torch.randn(1, 2, num_tokens, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    v = torch.randn(1, 2, num_tokens, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, generator=generator) if with_sinks else None
    found, weights = attention.packed_attention(
        nn.Identity(), q, k, v, None, scaling=0.7, sliding_window=window, softcap=softcap, s_aux=sinks,
        is_causal=causal, cu_seq_lens_q=tuple(Segment(*ends) for ends in pairwise(boundaries)),
    )  # fmt: skip
    expected = written_out(q, k, v, boundaries, 0.7, causal, window, softcap, sinks)
    assert weights is None and relative(found, expected) < 1e-12
    ours = torch.autograd.grad(found.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)


_APART = Segment(0, 3), Segment(3, 4), Segment(4, 6)
_SHARED = Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 6, 0, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("segments", [_APART, _SHARED], ids=["apart", "shared"])
def test_gradients_of_short_documents_equal_finite_differences(
    segments: tuple[Segment, ...], window: int | None, causal: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 6, 3, dtype=torch.float64, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    )
    asked = attention.Settings(0.7, causal, window)
    assert attention.is_short(q, v, segments, asked)
    assert torch.autograd.gradcheck(lambda *heads: attention.packed(*heads, segments, asked), (q, k, v))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mistral", "gpt2", "bert_mlm", "vit"])
def test_other_calls_go_through_transformers_own_attention(family: str) -> None:
    """A left-padded batch and encoders: nothing of ours may change them."""
    model, inputs = FAMILIES[family](), inputs_for(family)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, :5] = 0
    with torch.no_grad():
        expected = logits_of(model, inputs)
        assert attention.install(model)
        found = logits_of(model, inputs)
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    assert relative(found[seen], expected[seen]) < 1e-6


def test_generation_with_a_cache_goes_on_as_before() -> None:
    model = FAMILIES["gemma2"]()
    prompt = torch.arange(3, 15)[None]
    expected = model.generate(prompt, max_new_tokens=10, do_sample=False)
    assert attention.install(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=10, do_sample=False), expected)


def test_a_model_without_the_interface_is_left_alone() -> None:
    assert not attention.install(nn.Linear(2, 2))
    assert not attention.install(FAMILIES["bloom"]())
