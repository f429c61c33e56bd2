"""What the layers below the first adapted one make of a row: it never changes, so it is computed once and kept.

Each row runs through them alone, so that what they make of it is a function of its tokens, whichever rows stand beside
it and whether it was kept: a resumed run, which begins with nothing kept, meets the same bits.

Shapes: T tokens of a packed row, L of one document, H hidden.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter.wrapper import Wrapper
from loratune.model.attention import SEGMENTS
from loratune.model.prefixes import Segment


class Frozen:
    """The states below the first adapted layer, (L, H) by the tokens of a row, up to `max_bytes` of them."""

    def __init__(self, trunk: Any, layers: list[Any], max_bytes: int) -> None:
        self.trunk, self.layers, self.max_bytes = trunk, layers, max_bytes
        self.num_bytes = 0
        self._below = 0
        self._states: dict[bytes, Tensor] = {}

    @property
    def depth(self) -> int:
        """How many layers stand below the first that an adapter changes; 0 where one changes what comes before them."""
        stack = {id(layer) for layer in self.layers}
        others = [module for module in _outside(self.trunk, stack) if _is_changed(module)]
        first = next((i for i, layer in enumerate(self.layers) if any(map(_is_changed, layer.modules()))), 0)
        return 0 if others else first

    @contextmanager
    def standing_in(self, inputs: dict[str, Any]) -> Generator[None]:
        """Within the block, the layers below give what was kept of a packed row."""
        depth = self.depth
        if depth != self._below:  # another adapter
            self._states.clear()
            self._below, self.num_bytes = depth, 0
        if not depth:
            yield
            return
        ids = inputs["input_ids"][0]
        states = torch.cat([self._of(ids, segment) for segment in inputs[SEGMENTS]])[None]
        with _replaced(self.layers[:depth], lambda *_, **__: states):
            yield

    def _of(self, ids: Tensor, segment: Segment) -> Tensor:
        """Returns the states of a segment, (L, H); those of the beginning that it goes on from are computed with it."""
        row = torch.cat([ids[segment.from_start : segment.from_end], ids[segment.start : segment.end]])
        key = row.cpu().numpy().tobytes()
        states = self._states.get(key)
        if states is None:
            states = self._computed(row)
            if self.num_bytes + states.nbytes <= self.max_bytes:
                self._states[key] = states
                self.num_bytes += states.nbytes
        return states[segment.from_end - segment.from_start :]

    @torch.no_grad()
    def _computed(self, row: Tensor) -> Tensor:
        reached: list[Tensor] = []

        def reach(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            reached.append(hidden_states[0])
            return hidden_states

        places = torch.arange(len(row), device=row.device)
        segments = {SEGMENTS: (Segment(0, len(row)),)}
        with _replaced(self.layers[self._below :], reach):
            self.trunk(input_ids=row[None], position_ids=places[None], use_cache=False, **segments)
        return reached[0]


def stack_of(trunk: nn.Module, known: Iterable[nn.Module]) -> list[nn.Module] | None:
    """Returns the layers of a trunk in order where all of them are known, else None."""
    found = list(known)
    return next((found for stack in trunk.modules() if isinstance(stack, nn.ModuleList) and list(stack) == found), None)


def _outside(module: nn.Module, stack: set[int]) -> Generator[nn.Module]:
    yield module
    for child in module.children():
        if id(child) not in stack:
            yield from _outside(child, stack)


def _is_changed(module: nn.Module) -> bool:
    return isinstance(module, Wrapper) or any(each.requires_grad for each in module.parameters(recurse=False))


@contextmanager
def _replaced(layers: list[Any], forward: Callable[..., Tensor]) -> Generator[None]:
    before = [layer.__dict__["forward"] for layer in layers]  # that of its block: see `layers.Blocks`
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.forward = own
