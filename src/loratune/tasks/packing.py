"""Documents of an encoder without padding: its layers run on one row of real tokens, each attending to its document.

The model's own embeddings and head see padded rows as ever; between them the layers' module (BERT's `encoder`,
DistilBERT's `transformer`) is given the real tokens alone, and its states are put back. Shapes: N rows, L wide, T real
tokens, H hidden.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from loratune.model import attention
from loratune.model.prefixes import Segment

_LAYERS = ("encoder", "transformer")


class Packing:
    """The layers of an encoder, made to run packed within `row`; `None` from `of` where a family has no such module."""

    def __init__(self, model: Any, layers: nn.Module, before: str) -> None:
        self.model, self.layers = model, layers
        self._before = before  # the attention that the model had
        self._plain = layers.forward
        self._segments: tuple[Segment, ...] = ()
        self._real: Tensor | None = None
        layers.forward = self._forward

    @classmethod
    def of(cls, model: Any) -> "Packing | None":
        """Makes a model pack if it is an encoder with layers in one module that go through transformers' attention."""
        trunk = model.base_model
        layers = next((trunk._modules[name] for name in _LAYERS if trunk._modules.get(name) is not None), None)
        config = model.config
        if layers is None or config.is_encoder_decoder or getattr(config, "is_decoder", False):
            return None
        before = config._attn_implementation
        return cls(model, layers, before) if attention.install(model) else None

    def close(self) -> None:
        """Gives the model the forward and the attention that it had."""
        del self.layers.forward
        self.model.set_attn_implementation(self._before)

    @contextmanager
    def row(self, lengths: Sequence[int], mask: Tensor) -> Generator[None]:
        """Within the block rows of these lengths, real where mask (N, L) is 1, run as one row of T tokens."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self._segments = tuple(Segment(start, end) for start, end in pairwise(starts))
        self._real = mask.flatten().nonzero()[:, 0]
        try:
            with attention.packed_row():
                yield
        finally:
            self._segments, self._real = (), None

    def _forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._real is None:
            return self._plain(hidden_states, attention_mask, *args, **kwargs)
        packed = hidden_states.flatten(0, 1)[self._real][None]
        kwargs[attention.SEGMENTS] = self._segments
        outputs = self._plain(packed, None, *args, **kwargs)
        states = outputs.last_hidden_state[0]
        padded = states.new_zeros(hidden_states.shape[0] * hidden_states.shape[1], states.shape[-1])
        outputs.last_hidden_state = padded.index_copy(0, self._real, states).view(*hidden_states.shape[:2], -1)
        return outputs


def sorted_packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups the positions 0..n-1, longest first, so that each group's tokens are `max_tokens` at most."""
    packs: list[list[int]] = []
    room = 0
    for position in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        if lengths[position] > room:
            packs.append([])
            room = max(max_tokens, lengths[position])
        packs[-1].append(position)
        room -= lengths[position]
    return sorted(sorted(pack) for pack in packs)


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of two tensors, of the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
