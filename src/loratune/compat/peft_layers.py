"""PEFT's layers over loratune's wrappers: the names PEFT gives tensors, and the state PEFT keeps in each layer.

What is computed is `loratune.adapter`'s; the base's weights are never written. Shapes: I inputs, O outputs, R rank.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from loratune.adapter.factor import LowRank, Tied
from loratune.adapter.merge import put_merged
from loratune.adapter.sites import Site
from loratune.adapter.variants import merged
from loratune.adapter.wrapper import Adapted, Shared, call_with, unwrapped
from loratune.compat.peft_views import Tensors, TiedTensor, Values, View
from loratune.errors import AdapterError, ExportError


class KnownToPeft:
    """Makes isinstance(x, peft.Y) hold for what PEFT calls Y, once PEFT is loaded: trainers tell adapters from it."""

    peft_module = "peft"

    @property
    def __class__(self) -> type:  # type: ignore[override]
        theirs = getattr(sys.modules.get(self.peft_module), type(self).__name__, None)
        return theirs if isinstance(theirs, type) else type(self)


class BaseTunerLayer:
    """What PEFT's layers know of themselves: which adapters are active, disabled, merged."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    _disable_adapters = False
    _active_adapter: str | list[str] = "default"
    merged_adapters: list[str]

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def adapter_names(self) -> list[str]:
        """Returns the adapters this layer has."""
        raise NotImplementedError

    def trained(self, name: str) -> Iterator[nn.Parameter]:
        """Yields the parameters of one adapter here."""
        for container in self.adapter_layer_names:
            held: Any = getattr(self, container)
            if name in held:
                yield from [held[name]] if isinstance(held[name], nn.Parameter) else held[name].parameters()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones of this layer: they alone train, unless `inference_mode`."""
        self._active_adapter = adapter_names
        for name in self.adapter_names():
            self.set_requires_grad(name, name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in self.trained(name):
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters of this layer on or off; a merged layer that is switched off is unmerged."""
        self._disable_adapters = not enabled
        if enabled:
            self.set_adapter(self._active_adapter)
            return
        if self.merged:
            self.unmerge()
        self.set_requires_grad(self.adapter_names(), False)

    def delete_adapter(self, adapter_name: str) -> None:
        for container in self.adapter_layer_names:
            held: Any = getattr(self, container)
            if adapter_name in held:
                del held[adapter_name]

    def unmerge(self) -> None:
        """Puts the base's own weights back, bit for bit."""

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapter_names())


class LoraLayer(KnownToPeft, Adapted, BaseTunerLayer):
    """A frozen layer and its factors, laid out as PEFT's: `base_layer`, `lora_A`, `lora_B`, `scaling`, ..."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "lora_start")
    peft_module = "peft.tuners.lora.layer"

    def __init__(self, site: Site, shared: Shared) -> None:
        super().__init__(site.module, site.host, shared)
        self._modules["base_layer"] = self._modules.pop("base")
        del self._modules["active"]
        self.where = site
        self.in_features, self.out_features = site.sizes
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector, self.lora_start = nn.ModuleDict(), nn.ModuleDict()
        self.r, self.scaling = Values(self, "rank"), Values(self, "scale")
        self.lora_alpha, self.lora_dropout = Values(self, "lora_alpha"), Values(self, "dropout")
        self.merged_adapters: list[str] = []
        self.before_merge: dict[str, nn.Parameter] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "base_layer"), name)

    def __repr__(self) -> str:
        return "lora." + super().__repr__()

    @property
    def base(self) -> nn.Module:  # type: ignore[override]
        return self._modules["base_layer"]  # type: ignore[return-value]

    @property
    def active(self) -> list[LowRank]:  # type: ignore[override]
        if self._disable_adapters or self.merged:
            return []
        return [factor for name in self.active_adapters for factor in self.placed.get(name, ())]

    def adapter_names(self) -> list[str]:
        return list(self.placed)

    def trained(self, name: str) -> Iterator[nn.Parameter]:
        tied = [factor.source for factor in self.placed.get(name, ()) if isinstance(factor, Tied)]
        yield from (parameter for source in tied for _, parameter in source.named_parameters())
        yield from super().trained(name)

    def get_base_layer(self) -> nn.Module:
        return unwrapped(self)

    def hold(self, site: Site, name: str, factor: LowRank) -> LowRank:
        """Puts a factor's tensors into the containers under an adapter's name; returns the factor that reads them."""
        if isinstance(factor, Tied):
            if factor.transposed:
                self.lora_A[name], self.lora_B[name] = TiedTensor(factor, "A"), TiedTensor(factor, "B")
            return factor
        factor = factor.to(site.weight.device)
        _HOLDERS.get(site.host.kind, _hold_linear)(self, site, name, factor)
        if factor.A0 is not None:
            self.lora_start[name] = Tensors(start=(factor.A0, factor.B0))  # type: ignore[arg-type]
        if factor.magnitude is not None:
            shape = (1, -1, *(1,) * (factor.A.ndim - 2)) if site.host.kind == "Conv" else (-1,)
            self.lora_magnitude_vector[name] = Tensors(factor.magnitude.detach().view(shape))
        return View(self, name, factor, factor.A.shape[0] if factor.B.ndim == 3 else None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._disable_adapters or self.merged:
            return self.base(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.placed.pop(adapter_name, None)
        if adapter_name in self.lora_start:
            del self.lora_start[adapter_name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns s B A as the base stores its weight."""
        return self.host.oriented(sum(factor.delta() for factor in self.placed[adapter]))  # type: ignore[arg-type]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale to `scale` times that of the configuration."""
        view: Any = self.placed[adapter][0]
        view.scale = scale * view.lora_alpha / view.rank

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts W + s B A in the place of W; W itself is kept and comes back at `unmerge`.

        With `safe_merge` raises AdapterError, this layer as it was, if the sum is not finite; see `check_mergeable`.
        """
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.placed and name not in self.merged_adapters:
                self._merge_one(name, safe_merge)

    def check_mergeable(self, name: str) -> None:
        """Raises ExportError for a trained bias of B that the layer cannot take."""
        biased = any(factor.bias is not None for factor in self.placed.get(name, ()))
        if biased and getattr(unwrapped(self), "bias", None) is None:
            raise ExportError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")

    def _merge_one(self, name: str, safe_merge: bool) -> None:
        holder = unwrapped(self).get_submodule((self.where.parameter or "").rpartition(".")[0])
        before = dict(holder._parameters)
        self.check_mergeable(name)
        for factor in self.placed[name]:
            put_merged(self.where, factor)
        if safe_merge and not all(p.isfinite().all() for p in holder._parameters.values() if p is not None):
            holder._parameters.update(before)
            raise AdapterError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        replaced = {key: p for key, p in before.items() if p is not None and holder._parameters[key] is not p}
        self.before_merge = {**replaced, **self.before_merge}  # what the first merge replaced comes back
        self.merged_adapters = [*self.merged_adapters, name]

    def unmerge(self) -> None:
        holder = unwrapped(self).get_submodule((self.where.parameter or "").rpartition(".")[0])
        for name, parameter in self.before_merge.items():
            parameter.data = parameter.data.to(holder._parameters[name])  # where the model was moved meanwhile
            holder._parameters[name] = parameter
        self.before_merge, self.merged_adapters = {}, []


def _hold_linear(layer: LoraLayer, site: Site, name: str, factor: LowRank) -> None:
    A, B = factor.A.detach(), factor.B.detach()
    if B.ndim == 3:
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    layer.lora_A[name] = _with(nn.Linear(A.shape[1], A.shape[0], bias=False, device="meta"), A, None)
    layer.lora_B[name] = _with(nn.Linear(B.shape[1], B.shape[0], bias=False, device="meta"), B, factor.bias)


def _hold_conv(layer: LoraLayer, site: Site, name: str, factor: LowRank) -> None:
    base: Any = site.module
    kind: Any = type(base)
    rank, outputs, groups = factor.A.shape[0], factor.B.shape[0], factor.groups
    wide = {"groups": groups, "bias": False, "device": "meta"}
    placed = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    layer.lora_A[name] = _with(kind(base.in_channels, rank, base.kernel_size, **placed, **wide), factor.A, None)
    B = factor.B.detach()[(...,) + (None,) * (factor.A.ndim - 2)]
    layer.lora_B[name] = _with(kind(rank, outputs, 1, **wide), B, factor.bias)


def _hold_embedding(layer: LoraLayer, site: Site, name: str, factor: LowRank) -> None:
    layer.lora_embedding_A[name] = nn.Parameter(factor.A.detach())
    layer.lora_embedding_B[name] = nn.Parameter(factor.B.detach())


_HOLDERS = {"Conv": _hold_conv, "Embedding": _hold_embedding}


def _with(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module._parameters["weight"] = nn.Parameter(weight.detach())
    module._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach())
    return module


class Linear(LoraLayer):
    """A linear layer (transformers' Conv1D too) with factors."""


class Embedding(LoraLayer):
    """An embedding with factors."""


class Conv1d(LoraLayer):
    """A convolution with factors."""


class Conv2d(LoraLayer):
    """A convolution with factors."""


class Conv3d(LoraLayer):
    """A convolution with factors."""


class ParamWrapper(LoraLayer):
    """A module that computes with W + s B A in the place of one of its parameters; several are nested."""

    def __init__(self, site: Site, shared: Shared) -> None:
        super().__init__(site, shared)
        self.parameter_name = site.parameter or "weight"

    def extra_repr(self) -> str:
        return (
            f"parameter_name={self.parameter_name!r}, in_features={self.in_features}, out_features={self.out_features}"
        )

    def get_param(self) -> Tensor:
        return getattr(unwrapped(self), self.parameter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.shared.rows is not None and not self._disable_adapters:
            raise TypeError(f"lora.{type(self).__name__} does not support mixed adapter batches.")
        changed = dict(self.changed())
        return call_with(self.base, changed, args, kwargs) if changed else self.base(*args, **kwargs)

    def changed(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters that are replaced, by their names inside `base_layer`."""
        prefix, inner = "", self.base
        while isinstance(inner, LoraLayer):
            prefix, inner = prefix + "base_layer.", inner.base
        if self.active:
            yield prefix + self.parameter_name, self.total()

    def total(self) -> Tensor:
        """Returns W + s B A, differentiable."""
        weight = self.get_param()
        for factor in self.active:
            weight = merged(self.host, weight, factor)
        return weight


class MultiheadAttention(ParamWrapper):
    """torch's attention: q, k and v are one parameter, and the output projection's weight is read, never called."""

    @property
    def out_proj(self) -> nn.Module:
        return unwrapped(self.base.out_proj)  # type: ignore[arg-type]

    def changed(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().changed()
        projection: Any = self.base.out_proj
        if isinstance(projection, ParamWrapper) and projection.active:
            yield "out_proj.base_layer.weight", projection.total()

    def _restore_weights(self) -> None:
        """Nothing to restore: the weights were never written."""


_CLASSES = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d, nn.Embedding: Embedding}


def layer_class(site: Site) -> type[LoraLayer]:
    """Returns the class that stands around a site's module."""
    if site.parameter is not None:
        return MultiheadAttention if site.parameter == "in_proj_weight" else ParamWrapper
    return next((found for kind, found in _CLASSES.items() if isinstance(site.module, kind)), Linear)


def leaf(site: Site) -> Site:
    """Returns a site in terms of the module that owns the parameter: an attention's out_proj stands on its own."""
    owner, _, name = (site.parameter or "").rpartition(".")
    if not owner:
        return site
    return replace(
        site, module=unwrapped(site.module.get_submodule(owner)), parameter=name, owner=f"{site.owner}.{owner}"
    )
