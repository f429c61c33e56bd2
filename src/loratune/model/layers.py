"""Which layers of a model have a known structure, and when one function stands in for a layer's own forward.

A block is used only where its settings could be read and its result equals the plain forward at start; in every other
case, and for any call it is not made for, the family's own forward runs.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter.wrapper import is_watched, linear_of, trains
from loratune.model.attention import SEGMENTS, Settings
from loratune.model.blocks import ATTENTION, MLP, Block, Norm, Plan, Rotary, run

# Which norms a block has, and where they stand: before attention, after it, before the MLP, after it.
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_ORDERS: dict[frozenset[str], tuple[str | None, ...]] = {
    frozenset(_NORMS): _NORMS,
    frozenset(_NORMS[:2]): (_NORMS[0], None, _NORMS[1], None),
}


class Blocks:
    """The blocks of a model that are known, and whether they stand in for their layers' own forwards."""

    def __init__(self, model: nn.Module, settings: dict[nn.Module, Settings], recompute: bool = False) -> None:
        self.recompute = recompute
        self.num_used = 0  # calls that ran as one function
        self.found = [block for layer in model.modules() if (block := block_of(layer, settings)) is not None]
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        self._ends = {stack[-1] for stack in stacks if len(stack)}
        self._rows: Tensor | None = None
        self.is_narrowed = False  # whether the end of the stack, when it ran last, gave only the rows it was asked for

    @contextmanager
    def only(self, rows: Tensor) -> Generator[None]:
        """Within the block only these rows (n,) of the stack's end are asked for, if it can do with them."""
        self._rows, self.is_narrowed = rows, False
        try:
            yield
        finally:
            self._rows = None

    def use(self) -> None:
        """Lets the blocks run in place of their layers' forwards."""
        for block in self.found:
            block.layer.forward = self._forward_of(block)

    def close(self) -> None:
        """Gives every layer its own forward back."""
        for block in self.found:
            block.layer.__dict__.pop("forward", None)
        self.found = []

    def _forward_of(self, block: Block) -> Callable[..., Any]:
        plain: Callable[..., Any] = block.layer.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = self._rows if block.layer in self._ends and not block.layer._forward_hooks else None
            plan = None if args else _plan(block, hidden_states, kwargs, self.recompute, rows)
            if plan is None:
                return plain(hidden_states, *args, **kwargs)
            self.num_used += 1
            self.is_narrowed = plan.rows is not None
            return run(plan, hidden_states[0])[None]

        return forward


def _plan(block: Block, x: Tensor, kwargs: dict[str, Any], recompute: bool, rows: Tensor | None) -> Plan | None:
    """Returns how to compute a call as one function, or None where it is not one that a block is made for."""
    segments, positions = kwargs.get(SEGMENTS), kwargs.get("position_embeddings")
    if segments is None or positions is None or kwargs.get("past_key_values") is not None:
        return None
    if x.shape[0] != 1 or x.dtype not in (torch.float32, torch.float64) or block.layer.training:
        return None
    modules = block.modules()
    if is_changed(block, modules):
        return None
    linears = tuple(linear_of(module, x.shape[1], x.device) for module in modules[:7])
    if any(linear is None for linear in linears):
        return None
    cos, sin = (each[0][:, None] for each in positions)
    dropped = any(linear is not None and linear.mask for linear in linears[3:])  # masks are drawn for every position
    return Plan(block, linears, Rotary(cos, sin), segments, recompute, None if dropped else rows)  # type: ignore[arg-type]


def is_changed(block: Block, modules: list[nn.Module]) -> bool:
    """Whether somebody waits for one of a block's modules to be called, or a norm is not the one that was looked at (a
    saved module may have taken its place) or trains."""
    owners = {id(child) for part in (block.layer, block.layer.self_attn) for child in part.children()}
    if any(id(norm.module) not in owners or trains(norm.module) for norm in block.norms()):
        return True
    return any(is_watched(module) for module in modules)


def norms_of(layer: nn.Module) -> tuple[str | None, ...] | None:
    """Returns the names of a layer's norms, before and after attention, before and after the MLP (None: there is none);
    None for a layer of no known structure."""
    children = dict(layer.named_children())
    attention, mlp = children.pop("self_attn", None), children.pop("mlp", None)
    if attention is None or mlp is None or not hasattr(attention, "head_dim"):
        return None
    own = {name for name, _ in attention.named_children()}
    known = set(ATTENTION) <= own <= {*ATTENTION, "q_norm", "k_norm"}
    known = known and {name for name, _ in mlp.named_children()} == {*MLP, "act_fn"}
    return _ORDERS.get(frozenset(children)) if known else None


def block_of(layer: Any, settings: dict[nn.Module, Settings]) -> Block | None:
    """Returns the block of a layer of a known structure, or None."""
    order = norms_of(layer)
    taken = "forward" in layer.__dict__  # by accelerate, or by another CausalModel: it stays
    if order is None or taken or layer.self_attn not in settings:
        return None
    children, attention = dict(layer.named_children()), layer.self_attn
    modules = [None if name is None else children[name] for name in order]
    modules += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    norms = [None if module is None else _norm_of(module) for module in modules]
    if any(module is not None and norm is None for module, norm in zip(modules, norms, strict=True)):
        return None
    assert norms[0] is not None and norms[2] is not None
    return Block(layer, settings[attention], norms[0], norms[1], norms[2], norms[3], norms[4], norms[5])


@torch.no_grad()
def _norm_of(module: Any) -> Norm | None:
    """Returns an RMS norm with the offset it adds to its weight, found by what it computes, or None."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    x = torch.linspace(-2, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(2, -1)
    y: Tensor = module(x)
    candidates = (Norm(module, offset, eps) for offset in (0.0, 1.0))
    return next((norm for norm in candidates if torch.allclose(norm.forward(x), y, rtol=1e-5, atol=1e-6)), None)
