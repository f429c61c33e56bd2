"""Stacked experts with low-rank factors: each expert's product gets its rank-sized update; no W + s B A is formed.

Models with transformers' experts interface keep a plain forward beneath it that takes experts one by one,
`linear(x, self.gate_up_proj[e])`. While it runs, a stand-in takes the stacked parameter's place: indexing gives one
expert's weight, and a product with that weight adds s (x A_e^T) B_e^T. Anything else that a family does with a
weight gets the tensor W_e + s B_e A_e itself, so what is computed does not depend on how it is written.

Shapes: E experts, T tokens of one expert, I inputs, O outputs, R rank; A (E, R, I), B (E, O, R).
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapter.factor import LowRank

_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


def plain_forward(module: nn.Module, parameters: list[str]) -> Callable[..., Any] | None:
    """Returns the forward that takes experts one by one, or None where a module has none or other weights changed."""
    plain = getattr(type(module).forward, "__wrapped__", None)
    stacked = all("." not in name and module._parameters.get(name) is not None for name in parameters)
    return plain if stacked and all(module._parameters[name].ndim == 3 for name in parameters) else None  # type: ignore[union-attr]


@contextmanager
def standing_in(module: nn.Module, factors: Mapping[str, list[LowRank]]) -> Generator[None]:
    """Within the block each named parameter of a module is its stand-in; the parameters themselves are not touched."""
    swapped = bool(getattr(module, "is_transposed", False))
    for name, own in factors.items():
        module.__dict__[name] = _Stack(module._parameters[name], own, swapped)  # found before the parameter
    try:
        yield
    finally:
        for name in factors:
            del module.__dict__[name]


class _StandIn:
    """Something that is used as a tensor: what is not known here happens to the tensor it stands for."""

    def dense(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and isinstance(args[1], _Expert) and not args[1].swapped:
            return args[1].times(args[0], F.linear(args[0], args[1].weight, *args[2:], **(kwargs or {})))
        if func in _MATMULS and isinstance(args[1], _Expert) and args[1].swapped and isinstance(args[0], Tensor):
            return args[1].times(args[0], args[0] @ args[1].weight)
        real = [each.dense() if isinstance(each, _StandIn) else each for each in args]
        return func(*real, **{k: v.dense() if isinstance(v, _StandIn) else v for k, v in (kwargs or {}).items()})


class _Stack(_StandIn):
    """A stacked parameter, (E, O, I), or (E, I, O) where it is `swapped`."""

    def __init__(self, weight: Any, factors: list[LowRank], swapped: bool) -> None:
        self.weight, self.factors, self.swapped = weight, factors, swapped

    def __getitem__(self, index: Any) -> Any:
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        return _Expert(self, index) if one else self.dense()[index]

    def dense(self) -> Tensor:
        total = self.weight
        for factor in self.factors:
            delta = factor.live_delta().to(total.dtype)
            total = total + (delta.transpose(-1, -2) if self.swapped else delta)
        return total


class _Expert(_StandIn):
    """One expert's weight."""

    def __init__(self, stack: _Stack, index: Any) -> None:
        self.weight: Tensor = stack.weight[index]
        self.swapped = stack.swapped
        self.pairs = [(factor.A[index], factor.B[index], factor.scale) for factor in stack.factors]

    def times(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """Returns y + s (x A^T) B^T for each factor."""
        for A_RI, B_OR, scale in self.pairs:
            y_TO = y_TO + ((x_TI @ A_RI.to(x_TI.dtype).T) * scale) @ B_OR.to(x_TI.dtype).T
        return y_TO

    def dense(self) -> Tensor:
        total = self.weight
        for A_RI, B_OR, scale in self.pairs:
            delta = ((B_OR * scale) @ A_RI).to(total.dtype)
            total = total + (delta.T if self.swapped else delta)
        return total
