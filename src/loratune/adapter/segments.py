"""Several adapters in one batch, each at its own tokens: they train at the same time on one copy of the base model.

The documents of a batch stand adapter by adapter on its flattened token axis, so each adapter has one stretch of it.
W x is computed for all tokens at once, s B A x for each stretch with its adapter's own A and B.

Shapes: T tokens, I inputs, O outputs, R the ranks of all adapters at a site together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loratune.adapter.dropout import Mask, Noise
from loratune.adapter.fused import Linear
from loratune.adapter.variants import added
from loratune.errors import AdapterError


class Segment(NamedTuple):
    """What one adapter serves: a stretch of a batch's tokens, and of those rows among them that predict a label.

    noise: for the stretch alone. sites: the number of each slot among the adapter's own, on which its dropout masks
    depend: the same as where it is attached alone.
    """

    name: str
    sites: Mapping[nn.Module, int]
    tokens: slice
    rows: slice
    noise: Noise


@dataclass(frozen=True)
class Segments:
    """The segments of one batch, in the order of its tokens, all of which they cover."""

    parts: Sequence[Segment]

    def linear(self, slot: Any, num_tokens: int, device: torch.device) -> "Segmented | None":
        """Returns what a fused function needs to compute a slot's layer, or None where a factor is not plain."""
        self.stretches(slot, num_tokens)
        found: list[tuple[int, Linear]] = []
        for number, part in enumerate(self.parts):
            factors = slot.placed.get(part.name, ())
            if len(factors) > 1 or not all(factor.is_plain for factor in factors):
                return None
            found += [(number, Linear(slot.base, slot.host, each, self.mask(slot, part, each, device)))
                      for each in factors]  # fmt: skip
        return Segmented(slot, self, tuple(found))

    def stretches(self, slot: Any, num_tokens: int) -> list[slice]:
        """Returns where each segment's part of a layer's input is; raises AdapterError for one that was regrouped.

        The end of a model may be computed for the rows that predict a label only.
        """
        for each in ([part.tokens for part in self.parts], [part.rows for part in self.parts]):
            if each[-1].stop == num_tokens:
                return each
        raise AdapterError(
            f"a {type(slot.base).__name__} got {num_tokens} of {self.parts[-1].tokens.stop} tokens, regrouped, so it "
            "cannot tell which adapter serves which. Leave this layer out of the targets, or train each adapter alone."
        )

    def added(self, slot: Any, x: Tensor, y: Tensor) -> Tensor:
        """Returns a slot's frozen output y with each adapter's update at its own tokens: the plain path."""
        if slot.host.channel_dim != -1:
            raise AdapterError(f"a {type(slot.base).__name__} cannot tell which adapter serves which of its outputs.")
        y_TO, x_T = y.reshape(-1, y.shape[-1]), x.reshape(-1, *x.shape[y.ndim - 1 :])  # ids have no inputs' axis
        stretches = zip(self.parts, self.stretches(slot, len(y_TO)), strict=True)
        return torch.cat([self._part(slot, part, x_T[at], y_TO[at]) for part, at in stretches]).view(y.shape)

    def _part(self, slot: Any, part: Segment, x: Tensor, frozen: Tensor) -> Tensor:
        y = frozen
        for factor in slot.placed.get(part.name, ()):
            mask = self.mask(slot, part, factor, x.device)
            y = y + added(slot.host, slot.base, factor, x, x if mask is None else mask.apply(x), frozen).to(y.dtype)
        return y

    @staticmethod
    def mask(slot: Any, part: Segment, factor: Any, device: torch.device) -> Mask | None:
        """Returns the dropout of a segment's adapter at a slot, or None where nothing is dropped."""
        if not (slot.training and factor.dropout and slot.host.takes_dropout):
            return None
        return Mask(part.noise, part.sites[slot], factor.A.shape[1], factor.dropout, device)


class Segmented(NamedTuple):
    """A frozen linear layer with a plain factor for some of the segments of its input (or for none): see fused.Linear.

    A (R, I) and B (O, R) are those of all factors, one after another; z holds the (R_k, T_k) of each, flattened.
    layers: the number of a segment, and its factor on the layer.
    """

    slot: Any
    segments: Segments
    layers: tuple[tuple[int, Linear], ...]

    @property
    def mask(self) -> Mask | None:
        return next((linear.mask for _, linear in self.layers if linear.mask), None)

    def factors(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns (A, B) in the type the layer computes in."""
        if not self.layers:
            return None, None
        pairs = [linear.factors(like) for _, linear in self.layers]
        return torch.cat([A for A, _ in pairs if A is not None]), torch.cat([B for _, B in pairs if B is not None], 1)

    def forward(self, x_TI: Tensor, A_RI: Tensor | None, B_OR: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns (y (T, O), z)."""
        y_TO: Tensor = self.slot.host.forward(self.slot.base, x_TI)
        if A_RI is None or B_OR is None:
            return y_TO, None
        return y_TO, torch.cat([
            linear.add(y_TO[at], x_TI[at], A_RI[own], B_OR[:, own]).flatten() for linear, at, own in self._each(x_TI)
        ])  # fmt: skip

    def backward(
        self, x_TI: Tensor, z_RT: Tensor | None, A_RI: Tensor | None, B_OR: Tensor | None, g_TO: Tensor, *,
        with_input: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Returns (dx, dA, dB), dx None unless asked for."""
        dx_TI: Tensor | None = self.slot.host.input_grad(self.slot.base, g_TO) if with_input else None
        if A_RI is None or B_OR is None or z_RT is None:
            return dx_TI, None, None
        dA_RI, dB_OR, start = torch.empty_like(A_RI), torch.empty_like(B_OR), 0
        for linear, at, own in self._each(x_TI):
            shape = own.stop - own.start, at.stop - at.start
            z, start = z_RT[start : start + shape[0] * shape[1]].view(shape), start + shape[0] * shape[1]
            dx = None if dx_TI is None else dx_TI[at]
            dA_RI[own], dB_OR[:, own] = linear.add_input_grad(dx, x_TI[at], z, A_RI[own], B_OR[:, own], g_TO[at])
        return dx_TI, dA_RI, dB_OR

    def _each(self, x_TI: Tensor) -> Iterator[tuple[Linear, slice, slice]]:
        """Yields each factor's layer, the stretch of x that it sees, and its own rows of A."""
        stretches, start = self.segments.stretches(self.slot, len(x_TI)), 0
        for number, linear in self.layers:
            assert linear.factor is not None
            yield linear, stretches[number], slice(start, start := start + linear.factor.rank)
