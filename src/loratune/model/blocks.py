"""A decoder block as one function: less is kept for the backward pass, and what is element-wise is done once.

Kept of a block are its input, the raw query, key and value, what attention returned, and gate and up; norms, rotary
embedding, the residual between attention and MLP and the activation are computed again, which costs little. With
`recompute`, gate, up and the attention's P are computed again too.

Of the model's last block, only the rows that predict a label go on after attention. When a block is used stands in
`layers`.

Shapes: T tokens, H hidden, F width of the MLP, N heads, D head size; x (T, H), q (T, N, D).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from loratune.adapter.fused import Linear
from loratune.model.attention import (
    Segments,
    Settings,
    is_short,
    packed,
    short_documents,
    short_documents_backward,
    short_weights,
)

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_Q, _K, _V, _O, _GATE, _UP, _DOWN = range(7)


class Norm(NamedTuple):
    """y = x / rms(x) * (offset + w), rms(x)^2 = mean(x^2) + eps (Zhang and Sennrich 2019); Gemma's offset is 1."""

    module: Any
    offset: float
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return (x * self._inverse(x)).mul_(self.module.weight + self.offset)

    def backward(self, x: Tensor, g: Tensor) -> Tensor:
        """With h = g (offset + w) and i = 1 / rms(x): dx = i h - i^3 x mean(h x)."""
        inverse = self._inverse(x)
        h = g * (self.module.weight + self.offset)
        along = (h * x).sum(-1, keepdim=True).mul_(inverse**3).div_(-x.shape[-1])
        return h.mul_(inverse).addcmul_(x, along)

    def _inverse(self, x: Tensor) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return square.div_(x.shape[-1]).add_(self.eps).rsqrt_()


class Rotary(NamedTuple):
    """The rotary embedding of a row of tokens (Su et al. 2021): each half-pair of a head turned by its own angle."""

    cos: Tensor  # (T, 1, D)
    sin: Tensor

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        y = x * self.cos
        y[..., :half].addcmul_(x[..., half:], self.sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], self.sin[..., half:])
        return y

    def backward(self, g: Tensor) -> Tensor:
        half = g.shape[-1] // 2
        dx = g * self.cos
        dx[..., :half].addcmul_(g[..., half:], self.sin[..., half:])
        dx[..., half:].addcmul_(g[..., :half], self.sin[..., :half], value=-1)
        return dx


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block whose structure is known, and the forward it had before."""

    layer: Any
    settings: Settings
    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None

    def norms(self) -> Iterator[Norm]:
        """Yields the norms the block has."""
        each = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        yield from (norm for norm in (*each, self.query_norm, self.key_norm) if norm is not None)

    def modules(self) -> list[nn.Module]:
        """Returns the block's modules, linears first in the order of their numbers."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        linears = [getattr(attention, name) for name in ATTENTION] + [getattr(mlp, name) for name in MLP]
        return [*linears, attention, mlp, mlp.act_fn, *(norm.module for norm in self.norms())]


class Plan(NamedTuple):
    """One call of a block: its linears as they are now, and what came with the input.

    rows: (n,) the positions that anybody looks at after the model's last block; None: all.
    """

    block: Block
    linears: tuple[Linear, ...]
    rotary: Rotary
    segments: Segments
    recompute: bool
    rows: Tensor | None

    def narrow(self, x: Tensor) -> Tensor:
        """Returns the rows of x (T, ...) that are needed after attention."""
        return x if self.rows is None else x[self.rows]

    def widen(self, g: Tensor, num_tokens: int) -> Tensor:
        """Returns the gradient of x (T, ...) from that of its narrowed rows."""
        return g if self.rows is None else g.new_zeros(num_tokens, *g.shape[1:]).index_copy_(0, self.rows, g)


class _Kept(NamedTuple):
    """What the backward pass needs. `middle` is the state between attention and MLP, computed again where there is a
    norm between (then `o` is kept instead); `down` is kept only where a norm follows it."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    context: Tensor
    o: Tensor | None
    middle: Tensor | None
    gate: Tensor | None
    up: Tensor | None
    down: Tensor | None


def run(plan: Plan, x: Tensor) -> Tensor:
    """Returns what a block makes of x (T, H): (T, H), or (n, H) where the plan names rows."""
    factors = [each for linear in plan.linears for each in linear.factors(x)]
    return _Block.apply(x, plan, *factors)  # type: ignore[return-value]


class _Block(Function):
    """y = m + n4(down(act(gate n3(m)) * up n3(m))),  m = x + n2(o(attention(rotary(nq(q n1(x))), ...))).

    `factors` are A and B of the seven linears, None where one has none. What follows attention is done for the plan's
    rows only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *factors: Tensor | None) -> Tensor:
        block, z = plan.block, _Zs(plan, factors)
        n = block.before_attention.forward(x)
        q, k, v = (z.forward(index, n) for index in (_Q, _K, _V))
        context, weights = _attend(ctx, plan, q, k, v)
        o = z.forward(_O, plan.narrow(context))
        middle = plan.narrow(x) + (o if block.after_attention is None else block.after_attention.forward(o))
        n = block.before_mlp.forward(middle)
        gate, up = z.forward(_GATE, n), z.forward(_UP, n)
        down = z.forward(_DOWN, block.layer.mlp.act_fn(gate).mul_(up))
        y = middle + (down if block.after_mlp is None else block.after_mlp.forward(down))
        kept = _Kept(
            x, q, k, v, context,
            o=None if block.after_attention is None else o, middle=middle if block.after_attention is None else None,
            gate=None if plan.recompute else gate, up=None if plan.recompute else up,
            down=None if block.after_mlp is None else down,
        )  # fmt: skip
        ctx.plan, ctx.num_weights = plan, len(weights)
        ctx.save_for_backward(*kept, *z.values, *factors, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        plan: Plan = ctx.plan
        saved: Sequence[Tensor] = ctx.saved_tensors
        kept, saved = _Kept(*saved[: len(_Kept._fields)]), saved[len(_Kept._fields) :]
        z = _Zs(plan, saved[7:21], list(saved[:7]))
        needs_x, needs_context = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2 : 2 + 2 * _O])
        needs_middle = needs_x or needs_context or ctx.needs_input_grad[2 + 2 * _O]
        dmiddle = _backward_mlp(plan, kept, z, g, needs_middle)
        if dmiddle is None:
            return None, None, *z.gradients
        dx = _backward_attention(ctx, kept, z, saved[21:], dmiddle, needs_x, needs_x or needs_context)
        return dx, None, *z.gradients


class _Zs:
    """The seven linears with their factors, rank-sized activations z and the gradients of the factors."""

    def __init__(self, plan: Plan, factors: Sequence[Tensor | None], values: list[Tensor | None] | None = None) -> None:
        self.linears = plan.linears
        self.factors = factors
        self.values: list[Tensor | None] = [None] * 7 if values is None else values
        self.gradients: list[Tensor | None] = [None] * 14

    def forward(self, index: int, x: Tensor) -> Tensor:
        y, self.values[index] = self.linears[index].forward(x, *self._pair(index))
        return y

    def backward(self, index: int, x: Tensor, g: Tensor, with_input: bool = True) -> Tensor | None:
        A, B = self._pair(index)
        dx, dA, dB = self.linears[index].backward(x, self.values[index], A, B, g, with_input=with_input)
        self.gradients[2 * index : 2 * index + 2] = dA, dB
        return dx

    def _pair(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        return self.factors[2 * index], self.factors[2 * index + 1]


def _attend(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns (what attention returns, (T, N D); P of each document, where it is kept).

    Long documents, and what is not plain softmax, go through autograd in a small graph of their own.
    """
    asked = plan.block.settings
    heads = _heads(plan, q, k, v)
    if is_short(heads[0], heads[2], plan.segments, asked):
        context, weights = short_documents(*heads, plan.segments, asked.scale, asked.causal, asked.window)
        return context.view(len(q), -1), [] if plan.recompute else weights
    with torch.set_grad_enabled(any(ctx.needs_input_grad)):
        q, k, v = (head.detach().requires_grad_() for head in heads)
        context = packed(q, k, v, plan.segments, asked)
    ctx.attention = (context, (q, k, v))
    return context.detach().flatten(2)[0], []


def _heads(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and value as attention takes them, (1, N, T, D): normed and turned."""
    block, (q, k, v) = plan.block, _split(plan, q, k, v)
    q = q if block.query_norm is None else block.query_norm.forward(q)
    k = k if block.key_norm is None else block.key_norm.forward(k)
    turned = plan.rotary.forward(q), plan.rotary.forward(k), v
    q, k, v = (each.transpose(0, 1)[None] for each in turned)
    return q, k, v


def _split(plan: Plan, *rows: Tensor) -> tuple[Tensor, ...]:
    size: int = plan.block.layer.self_attn.head_dim
    return tuple(each.view(len(each), -1, size) for each in rows)


def _backward_mlp(plan: Plan, kept: _Kept, z: _Zs, g: Tensor, needs_middle: bool) -> Tensor | None:
    """Returns the gradient of the state between attention and MLP, or None where nothing below needs it."""
    block = plan.block
    ddown = g if block.after_mlp is None or kept.down is None else block.after_mlp.backward(kept.down, g)
    middle = _middle(plan, kept)
    n = block.before_mlp.forward(middle)
    gate = z.forward(_GATE, n) if kept.gate is None else kept.gate
    up = z.forward(_UP, n) if kept.up is None else kept.up
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        activated: Tensor = block.layer.mlp.act_fn(gate)
    dproduct = z.backward(_DOWN, activated.detach() * up, ddown)
    assert dproduct is not None
    dup = dproduct * activated.detach()
    dgate = torch.autograd.grad(activated, gate, dproduct.mul_(up))[0]
    dn = z.backward(_GATE, n, dgate, needs_middle)
    by_up = z.backward(_UP, n, dup, needs_middle)
    if dn is None or by_up is None:
        return None
    return block.before_mlp.backward(middle, dn.add_(by_up)).add_(g)


def _middle(plan: Plan, kept: _Kept) -> Tensor:
    if kept.middle is not None:
        return kept.middle
    assert plan.block.after_attention is not None and kept.o is not None
    return plan.narrow(kept.x) + plan.block.after_attention.forward(kept.o)


def _backward_attention(
    ctx: Any, kept: _Kept, z: _Zs, weights: Sequence[Tensor], dmiddle: Tensor, needs_x: bool, needs_context: bool
) -> Tensor | None:
    plan: Plan = ctx.plan
    block = plan.block
    do = dmiddle if block.after_attention is None or kept.o is None else block.after_attention.backward(kept.o, dmiddle)
    dcontext = z.backward(_O, plan.narrow(kept.context), do, needs_context)
    if dcontext is None:
        return None
    num_tokens = len(kept.x)
    dq, dk, dv = _backward_heads(ctx, kept, weights, plan.widen(dcontext, num_tokens))
    n = block.before_attention.forward(kept.x)
    by = [z.backward(index, n, g, needs_x) for index, g in ((_Q, dq), (_K, dk), (_V, dv))]
    if by[0] is None or by[1] is None or by[2] is None:
        return None
    return block.before_attention.backward(kept.x, by[0].add_(by[1]).add_(by[2])).add_(plan.widen(dmiddle, num_tokens))


def _backward_heads(
    ctx: Any, kept: _Kept, weights: Sequence[Tensor], dcontext: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the raw query, key and value, each (T, N D)."""
    plan: Plan = ctx.plan
    block, num_tokens = plan.block, len(dcontext)
    q, k = _split(plan, kept.q, kept.k)
    if hasattr(ctx, "attention"):
        context, leaves = ctx.attention
        gradients = torch.autograd.grad(context, leaves, dcontext.view(context.shape))
    else:
        heads = _heads(plan, kept.q, kept.k, kept.v)
        shape = (1, num_tokens, q.shape[1], q.shape[2])
        asked = block.settings
        again = (short_weights(*heads[:2], each, asked.scale, asked.causal, asked.window) for each in plan.segments)
        gradients = short_documents_backward(
            *heads, kept.context.view(shape), again if plan.recompute else weights, plan.segments, asked.scale,
            dcontext.view(shape),
        )  # fmt: skip
    dq, dk, dv = (each[0].transpose(0, 1) for each in gradients)
    dq, dk = plan.rotary.backward(dq), plan.rotary.backward(dk)
    dq = dq if block.query_norm is None else block.query_norm.backward(q, dq)
    dk = dk if block.key_norm is None else block.key_norm.backward(k, dk)
    dq, dk, dv = (each.reshape(num_tokens, -1) for each in (dq, dk, dv))
    return dq, dk, dv
