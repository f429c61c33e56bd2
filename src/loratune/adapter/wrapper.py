"""Adapted: the one wrapper that puts low-rank factors beside a frozen layer, y = W x + sum of s B (A x).

Shapes: T tokens, I inputs, O outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter.dropout import Noise
from loratune.adapter.factor import LowRank
from loratune.adapter.fused import lora_linear
from loratune.adapter.hosts import Host
from loratune.errors import AdapterError


@dataclass
class Shared:
    """What all wrappers of one model look at: whose rows are whose, and the dropout noise."""

    rows: Mapping[str, Tensor] | None = None  # adapter name -> indices of the batch rows it serves
    num_rows: int = 0
    noise: Noise | None = None  # None: dropout from torch's global generator
    num_sites: int = field(default=0)


class Adapted(nn.Module):
    """A frozen layer and the factors that are active on it. The layer's attributes (weight, bias, ...) show through.

    `active` holds the factors in use as submodules; `placed` all attached ones by adapter name, as plain values, so
    that a thousand attached adapters cost nothing in forward.
    """

    def __init__(self, base: nn.Module, host: Host, shared: Shared) -> None:
        super().__init__()
        self.base = base
        self.active = nn.ModuleList()
        self.host = host
        self.shared = shared
        self.placed: dict[str, LowRank] = {}
        self.site = shared.num_sites
        shared.num_sites += 1
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared = self.shared
        if shared.rows is not None:
            return self._by_rows(self.base(x, *args, **kwargs), x, shared.rows)
        active: Sequence[LowRank] = self.active  # type: ignore[assignment]
        if len(active) == 1 and self._can_fuse():
            return lora_linear(self.base, self.host, active[0], x, self.keep(active[0], x))
        y = self.base(x, *args, **kwargs)
        for factor in active:
            y = y + self.host.update(self.base, factor, self.dropped(factor, x))
        return y

    def _can_fuse(self) -> bool:
        return self.host.input_grad is not None and not any(p.requires_grad for p in self.base.parameters())

    def _by_rows(self, y: Tensor, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        if len(x) != self.shared.num_rows:  # another batch, or a model that flattens it before a layer (OPT's fc1)
            raise AdapterError(
                f"rows: {self.shared.num_rows} names were given, but a {type(self.base).__name__} got an input of "
                f"{tuple(x.shape)}: expected one name per row of the batch, and layers that see the batch by rows."
            )
        for name, index in rows.items():
            factor = self.placed.get(name)
            if factor is not None:
                update = self.host.update(self.base, factor, self.dropped(factor, x[index]))
                y = y.index_add(0, index, update.to(y.dtype))
        return y

    def keep(self, factor: LowRank, x: Tensor) -> Tensor | None:
        """Returns the mask of the inputs the adapter sees, bool (T, I), or None where nothing is dropped."""
        if not (self.training and factor.dropout and self.host.takes_dropout):
            return None
        num_tokens, width = x.numel() // x.shape[-1], x.shape[-1]
        noise = self.shared.noise
        if noise is not None and noise.num_tokens == num_tokens:
            return noise.keep(self.site, width, factor.dropout, x.device)
        return torch.rand(num_tokens, width, device=x.device) >= factor.dropout

    def dropped(self, factor: LowRank, x: Tensor) -> Tensor:
        """Returns the adapter's input after dropout, scaled by 1 / (1 - p) so that its expectation is x."""
        keep = self.keep(factor, x)
        return x if keep is None else (x * keep.view_as(x)) * (1 / (1 - factor.dropout))


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the frozen layer inside a wrapper, or the module itself."""
    return module.base if isinstance(module, Adapted) else module
