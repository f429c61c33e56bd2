"""The wrappers that put low-rank factors beside a frozen layer, y = W x + sum of s B (A x).

Adapted stands around a layer with one weight. Where a module keeps its weights to itself (attention's in_proj, stacked
experts), AdaptedWeights lets it compute with W + s B A in W's place. Shapes: T tokens, I inputs, O outputs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loratune.adapter.dropout import Mask, Noise
from loratune.adapter.experts import plain_forward, standing_in
from loratune.adapter.factor import LowRank
from loratune.adapter.fused import Fusible, Linear, lora_linear
from loratune.adapter.hosts import LINEAR, Host
from loratune.adapter.segments import Segments
from loratune.adapter.variants import added, merged
from loratune.errors import AdapterError


@dataclass
class Shared:
    """What all wrappers of one model look at: whose rows or tokens are whose, and the dropout noise."""

    rows: Mapping[str, Tensor] | None = None  # adapter name -> indices of the batch rows it serves
    segments: Segments | None = None  # or the tokens of a batch that each of several adapters serves
    num_rows: int = 0
    noise: Noise | None = None  # None: dropout from torch's global generator
    num_sites: int = field(default=0)


class Wrapper(nn.Module):
    """What stands around a module of the base model, which is its `base`."""

    base: nn.Module


class Slot(Wrapper):
    """One site: the factors in use there as submodules (`active`), and all attached ones by adapter name (`placed`).

    `placed` holds plain values, so that a thousand attached adapters cost nothing in forward.
    """

    def __init__(self, base: nn.Module, host: Host, shared: Shared) -> None:
        super().__init__()
        self.base = base
        self.active = nn.ModuleList()
        self.host = host
        self.shared = shared
        self.placed: dict[str, list[LowRank]] = {}
        self.site = shared.num_sites
        shared.num_sites += 1
        self.training = base.training

    def factors(self) -> Iterable[LowRank]:
        return self.active  # type: ignore[return-value]


class Adapted(Slot):
    """A frozen layer and the factors that are active on it. The layer's attributes (weight, bias, ...) show through."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.shared.rows is not None:
            return self._by_rows(self.base(x, *args, **kwargs), x, self.shared.rows)
        if self.shared.segments is not None:
            linear = self.linear(_num_tokens(x), x.device)
            if linear is not None:
                return lora_linear(linear, x)
            return self.shared.segments.added(self, x, self.base(x, *args, **kwargs))
        if len(self.active) == 1 and (linear := self.linear(_num_tokens(x), x.device)) is not None:
            return lora_linear(linear, x)
        frozen = y = self.base(x, *args, **kwargs)
        for factor in self.factors():
            y = y + added(self.host, self.base, factor, x, self.dropped(factor, x), frozen).to(y.dtype)
        return y

    def linear(self, num_tokens: int, device: torch.device) -> Fusible | None:
        """Returns what a fused function needs to compute this layer for so many tokens, or None where none may: rows of
        several adapters, several factors, one that is not plain; a base that trains, is watched or has no such path."""
        if self.shared.rows is not None or len(self.active) > 1 or self.host.input_grad is None:
            return None
        if trains(self.base) or is_watched(self.base):
            return None
        if self.shared.segments is not None:
            return self.shared.segments.linear(self, num_tokens, device)
        factor: Any = self.active[0] if len(self.active) else None
        if factor is not None and not factor.is_plain:
            return None
        mask = None if factor is None else self.mask(factor, (num_tokens, factor.A.shape[1]), device)
        return Linear(self.base, self.host, factor, mask)

    def _by_rows(self, y: Tensor, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        if len(x) != self.shared.num_rows:  # another batch, or a model that flattens it before a layer (OPT's fc1)
            raise AdapterError(
                f"rows: {self.shared.num_rows} names were given, but a {type(self.base).__name__} got an input of "
                f"{tuple(x.shape)}: expected one name per row of the batch, and layers that see the batch by rows."
            )
        for name, index in rows.items():
            for factor in self.placed.get(name, ()):
                part = x[index]
                update = added(self.host, self.base, factor, part, self.dropped(factor, part), y[index])
                y = y.index_add(0, index, update.to(y.dtype))
        return y

    def mask(self, factor: LowRank, shape: tuple[int, int], device: torch.device) -> Mask | None:
        """Returns the dropout of this site for an input of a shape (T, I), or None where nothing is dropped."""
        if not (self.training and factor.dropout and self.host.takes_dropout):
            return None
        num_tokens, width = shape
        noise = None if self.shared.noise is None else self.shared.noise.at(num_tokens)
        if noise is None:
            noise = torch.rand(num_tokens, width, device=device) < factor.dropout
        return Mask(noise, self.site, width, factor.dropout, device)

    def dropped(self, factor: LowRank, x: Tensor) -> Tensor:
        """Returns the adapter's input after dropout, scaled by 1 / (1 - p) so that its expectation is x."""
        mask = self.mask(factor, (_num_tokens(x), x.shape[-1]), x.device)
        return x if mask is None else mask.apply(x)


def _num_tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def linear_of(module: nn.Module, num_tokens: int, device: torch.device) -> Fusible | None:
    """Returns what a fused function needs to compute a linear layer, adapted or not, or None: see `Adapted.linear`."""
    if isinstance(module, Adapted):
        return module.linear(num_tokens, device)
    if type(module) is nn.Linear and not (trains(module) or is_watched(module)):
        return Linear(module, LINEAR, None, None)
    return None


def trains(module: nn.Module) -> bool:
    """Whether a parameter of a module gets a gradient, which the fused functions do not form."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for a module to be called: with a hook, or with a forward put in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__


class AdaptedWeights(Wrapper):
    """A module some of whose parameters are adapted: it computes with W + s B A in the place of each.

    `slots` holds one Slot per adapted parameter, by the parameter's path inside the module, dots written as "/".
    """

    def __init__(self, base: nn.Module, shared: Shared) -> None:
        super().__init__()
        self.base = base
        self.shared = shared
        self.slots = nn.ModuleDict()
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def slot(self, parameter: str, host: Host) -> Slot:
        key = parameter.replace(".", "/")
        if key not in self.slots:
            slot = Slot(nn.Module(), host, self.shared)
            self.slots[key] = slot
        return self.slots[key]  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.shared.rows is not None or self.shared.segments is not None:
            raise AdapterError(
                f"rows: a {type(self.base).__name__} computes all rows with one weight, so it cannot serve each row "
                "its own adapter. Run each adapter's rows apart."
            )
        active = {key: list(slot.factors()) for key, slot in self.slots.items() if len(slot.active)}  # type: ignore[operator, arg-type]
        one_by_one = plain_forward(self.base, list(active)) if active else None
        if one_by_one is not None:
            with standing_in(self.base, active):
                return one_by_one(self.base, *args, **kwargs)
        changed = {name: weight for name, weight in self._changed() if weight is not None}
        return call_with(self.base, changed, args, kwargs) if changed else self.base(*args, **kwargs)

    def _changed(self) -> Iterator[tuple[str, Tensor | None]]:
        for key, module in self.slots.items():
            slot: Any = module
            name = key.replace("/", ".")
            weight: Tensor | None = None
            for factor in slot.factors():
                weight = merged(slot.host, attrgetter(name)(self.base) if weight is None else weight, factor)
            yield name, weight


def call_with(module: nn.Module, changed: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """Calls a module with other tensors in the place of some of its parameters.

    While FSDP (version 1) computes, a plain attribute stands in a parameter's place, which functional_call passes by.
    """
    plain: list[tuple[dict[str, Any], str, Any]] = []
    for path, tensor in changed.items():
        owner, _, name = path.rpartition(".")
        attributes = module.get_submodule(owner).__dict__
        if name in attributes:
            plain.append((attributes, name, attributes[name]))
            attributes[name] = tensor
    try:
        return functional_call(module, dict(changed), args, kwargs)
    finally:
        for attributes, name, before in plain:
            attributes[name] = before


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the frozen layer inside its wrappers, or the module itself."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def lookup(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path of the plain model, looked for through wrappers; the layer, not its wrapper."""
    module = unwrapped(model)
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            raise AttributeError(f"{type(model).__name__} has no module {path!r}")
        module = unwrapped(child)
    return module


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns (the module that holds a path's last part, that part)."""
    parent, _, name = path.rpartition(".")
    return lookup(model, parent), name
