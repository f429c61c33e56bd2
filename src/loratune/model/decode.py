"""A decoder block as few operations, for generating: with one token at a time, what Python adds to a layer counts.

Beside reading the weights a token costs what its operations take to be called: in a Gemma layer with seven adapted
linears about 150, a third of them norms. Here they are about 70, which more than pays for the adapter's. And on a CPU
the products of few rows are taken the other way round, which reads the weights two to five times faster.

Shapes: N rows, L tokens of each that are new, H hidden, Q query heads, K key-value heads, D head size.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapter.fused import Linear
from loratune.adapter.wrapper import linear_of
from loratune.model import attention, layers
from loratune.model.blocks import Block, Norm
from loratune.model.narrow import Narrow

Step = Callable[[Tensor], Tensor]
# Up to so many rows x, (W x^T)^T is faster than x W^T on a CPU: see LOG.md.
FEW_ROWS = 64
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}
_PROBE = ((5, 3, 1, 2), (0, 0, 4, 1))  # token ids of two rows, the second padded on its left
_known: "WeakKeyDictionary[nn.Module, list[Block]]" = WeakKeyDictionary()


@contextmanager
@torch.no_grad()
def decoding(model: nn.Module) -> Generator[None]:
    """Within the block, layers of a known structure generate in few operations, where that gives what they give.

    Adapters must stay as they are meanwhile. Any other call runs the layers' own forwards.
    """
    before = {layer: layer.__dict__.pop("forward") for layer in model.modules() if _is_ours(layer)}
    try:
        if model not in _known:
            _known[model] = _verified(model)
        with _used(_known[model]), _head_used(model):
            yield
    finally:
        for layer, forward in before.items():
            layer.__dict__["forward"] = forward


def _is_ours(layer: nn.Module) -> bool:
    """Whether a layer's forward was put there for training: see `layers.Blocks`."""
    return getattr(layer.__dict__.get("forward"), "__module__", None) == layers.__name__


@contextmanager
def _used(blocks: list[Block]) -> Generator[None]:
    steps = {block.layer: step for block in blocks if (step := _Lean.of(block)) is not None}
    for layer, step in steps.items():
        layer.forward = step.forward
    try:
        yield
    finally:
        for layer in steps:
            del layer.forward


@contextmanager
def _head_used(model: Any) -> Generator[None]:
    """Within the block, the head's logits of few rows are formed as a block's products are."""
    head: Any = model.get_output_embeddings()
    if head is None or not isinstance(linear := linear_of(head, 1, model.device), Linear) or linear.mask is not None:
        yield
        return
    step, plain = _step(linear), head.forward

    def forward(states: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return plain(states)
        return step(states.flatten(0, -2)).view(*states.shape[:-1], -1)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _verified(model: Any) -> list[Block]:
    """Returns the blocks of a model, or none where they do not give what its own forward gives."""
    before = model.config._attn_implementation
    ids = torch.tensor(_PROBE, device=model.device)
    if model.dtype not in _TOLERANCE or not attention.install(model):
        return []
    try:
        with attention.recording() as settings:
            _states(model, ids)
    finally:
        model.set_attn_implementation(before)
    blocks = [block for layer in model.modules() if (block := layers.block_of(layer, settings)) is not None]
    blocks = [block for block in blocks if block.settings.causal and not block.settings.is_special]
    plain = _states(model, ids)
    try:
        with _used(blocks):
            lean = _states(model, ids)
    except RuntimeError:  # shapes that do not fit: not the structure it seemed
        return []
    difference = (lean - plain).abs().max() / plain.abs().max()
    return blocks if difference <= _TOLERANCE[model.dtype] else []


def _states(model: Any, ids: Tensor) -> Tensor:
    """Returns the hidden states of two rows, with a token more each from the cache; padding's are left out."""
    mask = (ids > 0).long()
    first = model.base_model(input_ids=ids, attention_mask=mask, use_cache=True)
    mask = torch.cat([mask, mask[:, -1:]], 1)
    more = model.base_model(
        input_ids=ids[:, :1] + 1, attention_mask=mask, past_key_values=first.past_key_values, use_cache=True
    )
    return torch.cat([first.last_hidden_state, more.last_hidden_state], 1)[mask.bool()]


class _Lean:
    """The operations of one block, with what does not change from token to token made ready."""

    def __init__(self, block: Block, linears: list[Step]) -> None:
        self.layer, self.plain = block.layer, block.layer.forward
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = linears
        self.before_attention, self.before_mlp = _norm(block.before_attention), _norm(block.before_mlp)
        self.after_attention, self.after_mlp = _norm(block.after_attention), _norm(block.after_mlp)
        self.query_norm, self.key_norm = _norm(block.query_norm), _norm(block.key_norm)
        self.act_fn, self.scale = block.layer.mlp.act_fn, block.settings.scale
        self.head_dim, self.index = block.layer.self_attn.head_dim, block.layer.self_attn.layer_idx

    @classmethod
    def of(cls, block: Block) -> "_Lean | None":
        """Returns the block made ready; None where a linear of it is more than W x + b + s B A x, or somebody looks."""
        modules, device = block.modules(), block.before_attention.module.weight.device
        if layers.is_changed(block, modules):
            return None
        linears = [linear_of(module, 1, device) for module in modules[:7]]
        steps = [_as_rows(_step(each)) for each in linears if isinstance(each, Linear) and each.mask is None]
        return cls(block, steps) if len(steps) == 7 else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        turn, cache = kwargs.get("position_embeddings"), kwargs.get("past_key_values")
        if args or turn is None or cache is None or torch.is_grad_enabled() or kwargs.get("output_attentions"):
            return self.plain(hidden_states, *args, **kwargs)
        x = hidden_states.flatten(0, 1)
        o = self.o(self._attention(x, hidden_states.shape[:2], turn, kwargs.get("attention_mask"), cache))
        x = x + self.after_attention(o)
        n = self.before_mlp(x)
        x = x + self.after_mlp(self.down(self.act_fn(self.gate(n)).mul_(self.up(n))))
        return x.view_as(hidden_states)

    def _attention(self, x: Tensor, shape: torch.Size, turn: Any, mask: Tensor | None, cache: Any) -> Tensor:
        n = self.before_attention(x)
        q, k, v = (linear(n).view(*shape, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        cos, sin = (each.unsqueeze(2) for each in turn)
        q, k = _turned(self.query_norm(q), cos, sin), _turned(self.key_norm(k), cos, sin)
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.index)
        if shape[1] == 1:  # the query heads that share a key head are rows of one matrix
            q = q.view(shape[0], k.shape[1], -1, self.head_dim)
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale).reshape(len(x), -1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return y.transpose(1, 2).reshape(len(x), -1)


def _step(linear: Linear) -> Step:
    """Returns y = W x + b + s B A x; that of few rows lies in memory as its transpose."""
    base, host_forward, factor = linear.base, linear.host.forward, linear.factor
    assert host_forward is not None
    forward = _few_rows(base, host_forward) if _is_plain_cpu(base) else partial(host_forward, base)
    if factor is None:
        return forward
    A_IR, B_RO = factor.A.detach().T, (factor.B.detach() * factor.scale).T
    return lambda x: forward(x).contiguous().addmm_(x @ A_IR, B_RO)


def _is_plain_cpu(base: nn.Module) -> bool:
    """Whether a layer's weight is a matrix in memory; one that is kept narrow is widened stretch by stretch."""
    if type(base) is not nn.Linear or isinstance(base.weight, Narrow):
        return False
    return base.weight.device.type == "cpu" and base.weight.dtype in _TOLERANCE


def _few_rows(base: Any, many: Callable[[Any, Tensor], Tensor]) -> Step:
    """Returns y = W x + b, of few rows as (W x^T)^T; one row is taken twice, since a vector has but one core."""
    weight, bias = base.weight.detach(), base.bias

    def forward(x: Tensor) -> Tensor:
        if len(x) > FEW_ROWS:
            return many(base, x)
        y = (weight @ (x if len(x) > 1 else x.repeat(2, 1)).T).T[: len(x)]
        return y if bias is None else y.add_(bias)

    return forward


def _as_rows(step: Step) -> Step:
    return lambda x: step(x).contiguous()


def _norm(norm: Norm | None) -> Step:
    """Returns the norm with its weight and offset added up; what is not there changes nothing."""
    if norm is None:
        return lambda x: x
    weight = norm.module.weight + norm.offset
    eps, share = weight.new_full((), norm.eps), 1 / len(weight)

    def normed(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(eps, length, length, value=share).rsqrt_()).mul_(weight)

    return normed


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x (N, L, heads, D): each half-pair of a head turned by its own angle."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.addcmul(x * cos, torch.cat([-second, first], -1), sin)
