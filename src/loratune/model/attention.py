"""Attention for packed documents: each attends to itself alone, and its cost is that of the document, not of the pack.

Registered with transformers under one name. In a packed row the model passes our segments through as a keyword; any
other call (padded batches, generation with a cache) goes to transformers' own attention.

Shapes: T tokens, Q query heads, K key-value heads, D head size; q (1, Q, T, D), k and v (1, K, T, D).
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loratune.model.prefixes import Segment

Segments = tuple[Segment, ...]
NAME = "loratune_packed"  # transformers takes a name with "flash" in it for a kernel of its hub
SHORT_TOKENS = 256  # up to here keeping P (L x L a head) is cheaper than recomputing it
SEGMENTS = "cu_seq_lens_q"  # a keyword that every family with the attention interface hands down

# Only the building of masks looks at this; the segments themselves travel as a keyword, so that a backward pass in
# another thread or a recomputed layer sees them.
_packed: ContextVar[bool] = ContextVar("loratune_packed", default=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a module asks of its attention, whatever the input."""

    scale: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def is_special(self) -> bool:
        return self.softcap is not None or self.sinks is not None


# The settings that each module called with, while somebody wants to know.
_recorded: ContextVar[dict[nn.Module, Settings] | None] = ContextVar("loratune_recorded", default=None)


@contextmanager
def recording() -> Generator[dict[nn.Module, Settings]]:
    """Within the block the settings of every attention module that runs are noted in what is yielded."""
    calls: dict[nn.Module, Settings] = {}
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


@contextmanager
def packed_row() -> Generator[None]:
    """Within the block the model builds no attention mask: its input is one packed row."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def install(model: nn.Module) -> bool:
    """Makes a model use this attention; returns False where its family does not go through transformers' interface."""
    if not getattr(type(model), "_can_set_attn_implementation", bool)():
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return model.config._attn_implementation == NAME  # type: ignore[union-attr]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


def packed_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns ((1, T, Q, D), None): softmax(q k^T * scaling) v within each document, as transformers' interface asks.

    Handles a sliding window, a tanh soft cap (Gemma 2) and attention sinks (gpt-oss) as the family passes them.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    asked = Settings(scale, causal, sliding_window, softcap, s_aux, dropout)
    if (calls := _recorded.get()) is not None:
        calls[module] = asked
    segments: Segments | None = kwargs.get(SEGMENTS)
    if segments is not None:
        return packed(q, k, v, segments, asked), None
    if not asked.is_special:
        return sdpa_attention_forward(
            module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )  # type: ignore[return-value]
    mask = attention_mask if attention_mask is not None else _window(q.shape[2], k.shape[2], causal, None, q.device)
    return _explicit(q, k, v, mask, scale, softcap, s_aux, dropout).transpose(1, 2).contiguous(), None


def packed(q: Tensor, k: Tensor, v: Tensor, segments: Segments, asked: Settings) -> Tensor:
    """Returns the attention of each segment of a packed row to itself and to what it goes on from, (1, T, Q, D)."""
    if is_short(q, v, segments, asked):
        return _ShortDocuments.apply(q, k, v, segments, asked.scale, asked.causal, asked.window)  # type: ignore[return-value]
    pieces: list[Tensor] = []
    for segment in segments:
        length, reach = segment.end - segment.start, segment.end - segment.start + segment.from_end - segment.from_start
        window = asked.window if asked.window is not None and asked.window < reach else None
        qd = q[:, :, segment.start : segment.end]
        kd, vd = (_seen(each[0], segment)[None] for each in (k, v))
        if asked.is_special:
            mask = _window(length, reach, asked.causal, window, q.device)
            pieces.append(_explicit(qd, kd, vd, mask, asked.scale, asked.softcap, asked.sinks, asked.dropout))
            continue
        plain = window is None and length == reach
        mask = None if plain else _window(length, reach, asked.causal, window, q.device)
        pieces.append(
            F.scaled_dot_product_attention(
                qd, kd, vd, mask, asked.dropout, is_causal=asked.causal and plain, scale=asked.scale, enable_gqa=True
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()


def is_short(q: Tensor, v: Tensor, segments: Segments, asked: Settings) -> bool:
    """Whether to write attention out: on a CPU, in full precision, where no document is long."""
    plain = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and q.shape[-1] == v.shape[-1]
    longest = max(each.end - each.start + each.from_end - each.from_start for each in segments)
    return plain and longest <= SHORT_TOKENS and not asked.is_special and asked.dropout == 0


class _ShortDocuments(Function):
    """Attention of short documents, written out: see `short_documents`. P is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        output, kept = short_documents(q, k, v, segments, scale, causal, window)
        ctx.save_for_backward(q, k, v, output, *kept)
        ctx.segments, ctx.scale = segments, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, k, v, output, *kept = ctx.saved_tensors
        return *short_documents_backward(q, k, v, output, kept, ctx.segments, ctx.scale, g), None, None, None, None


def short_documents(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Returns (O (1, T, Q, D), P of each document): P = softmax(scale q k^T), O = P v, a batched product each.

    The query heads that share a key head are rows of one matrix, so nothing is repeated.
    Shapes: L tokens of a document, G query heads per key head; q as (K, G L, D), P as (K, G L, L).
    """
    num_tokens, num_heads, width = q.shape[2], q.shape[1], q.shape[3]
    output = q.new_empty(1, num_tokens, num_heads, width)
    kept: list[Tensor] = []
    for segment in segments:
        start, end = segment.start, segment.end
        weights = short_weights(q, k, segment, scale, causal, window)
        kept.append(weights)
        output[0, start:end] = _unfolded(torch.bmm(weights, _seen(v[0], segment)), num_heads).transpose(0, 1)
    return output, kept


def short_weights(q: Tensor, k: Tensor, segment: Segment, scale: float, causal: bool, window: int | None) -> Tensor:
    """Returns P = softmax(scale q k^T) of one segment, (K, G L, what it sees)."""
    kd = _seen(k[0], segment)
    scores = torch.bmm(_folded(q[0, :, segment.start : segment.end], len(kd)), kd.transpose(1, 2)).mul_(scale)
    mask = _window(segment.end - segment.start, kd.shape[1], causal, window, q.device)
    if mask is not None:
        scores.view(len(kd), -1, *mask.shape).masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1)


def short_documents_backward(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, kept: Iterable[Tensor], segments: Segments, scale: float,
    g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (dq, dk, dv), shaped as q, k and v and laid out token by token. With S the scores and g = dO:

    dv = P^T g;  dS = P * (g v^T - rowsum(g * O));  dq = scale dS k;  dk = scale dS^T q.
    """
    dq, dk, dv = (_by_tokens(each) for each in (q, k, v))
    shared = any(segment.from_start < segment.from_end for segment in segments)
    if shared:  # what several go on from gets a gradient from each
        dk.zero_()
        dv.zero_()
    for weights, segment in zip(kept, segments, strict=True):
        start, end = segment.start, segment.end
        qd, gd, od = (
            _folded(each, k.shape[1])
            for each in (q[0, :, start:end], g[0, start:end].transpose(0, 1), output[0, start:end].transpose(0, 1))
        )
        kd, vd = _seen(k[0], segment), _seen(v[0], segment)
        ds = torch.bmm(gd, vd.transpose(1, 2)).sub_((gd * od).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        dq[0, :, start:end] = _unfolded(torch.bmm(ds, kd), q.shape[1])
        _give_back(dk[0], torch.bmm(ds.transpose(1, 2), qd), segment, shared)
        _give_back(dv[0], torch.bmm(weights.transpose(1, 2), gd), segment, shared)
    return dq, dk, dv


def _seen(heads: Tensor, segment: Segment) -> Tensor:
    """Returns the keys or values (K, T, D) that a segment looks at: what it goes on from, then its own."""
    own = heads[:, segment.start : segment.end]
    if segment.from_start == segment.from_end:
        return own
    return torch.cat([heads[:, segment.from_start : segment.from_end], own], dim=1)


def _give_back(total: Tensor, gradient: Tensor, segment: Segment, shared: bool) -> None:
    """Puts the gradient of what `_seen` returned where it came from; adds it up where segments share."""
    if not shared:
        total[:, segment.start : segment.end] = gradient
        return
    num_before = segment.from_end - segment.from_start
    total[:, segment.from_start : segment.from_end] += gradient[:, :num_before]
    total[:, segment.start : segment.end] += gradient[:, num_before:]


def _by_tokens(like: Tensor) -> Tensor:
    """An empty (1, heads, T, D) whose memory is (T, heads, D), as the projections before it have it."""
    _, heads, num_tokens, width = like.shape
    return like.new_empty(1, num_tokens, heads, width).transpose(1, 2)


def _folded(heads: Tensor, groups: int) -> Tensor:
    """(heads, L, D) -> (groups, heads / groups * L, D): heads that share a key head become rows of one matrix."""
    return heads.reshape(groups, -1, heads.shape[-1])


def _unfolded(rows: Tensor, num_heads: int) -> Tensor:
    return rows.reshape(num_heads, -1, rows.shape[-1])


def _window(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Returns the mask (queries, keys), True where a query may look: not ahead, and less than `window` away."""
    if not causal and window is None:
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return allowed if window is None else allowed & (distance.abs() < window)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Attention written out, for what scaled_dot_product_attention lacks: tanh soft caps and sinks."""
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        # The lowest number, not -inf: a padded row's query sees no key at all, and its NaN would spread through v.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], dim=-1)
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights[..., : k.shape[2]] @ v.repeat_interleave(groups, 1)
