"""loratune's attachments with PEFT's layers, and PEFT's way of switching and merging adapters."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loratune.adapter.adapter import Adapter
from loratune.adapter.attach import Attachments, attach
from loratune.adapter.factor import LowRank, Tied
from loratune.adapter.merge import settle_ties, tie_again
from loratune.adapter.modules import logical_modules, put_parameter, tied, ties
from loratune.adapter.sites import TOKENS, Site
from loratune.adapter.wrapper import parent_of, unwrapped
from loratune.compat.peft_config import LoraConfig
from loratune.compat.peft_layers import LoraLayer, layer_class, leaf
from loratune.compat.peft_wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from loratune.errors import AdapterError, ConfigError


class PeftWarning(UserWarning):
    """What PEFT warns of."""


class Layers(Attachments):
    """Everything attached to one model, laid out in PEFT's layers and switched in PEFT's way."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self.views: dict[str, dict[str, LowRank]] = {}  # adapter -> site -> its factor as the layers hold it
        self.saved: dict[str, ModulesToSaveWrapper] = {}
        self.ties = ties(model)
        self.frozen = False  # whether the active adapters are used, not trained

    @classmethod
    def on(cls, model: nn.Module) -> "Layers":
        """Returns the attachments of a model, made if there are none; raises AdapterError for other ones."""
        found = Attachments.of(model)
        if found is None:
            found = model.__dict__["_loratune"] = cls(model)
        if not isinstance(found, Layers):
            raise AdapterError(f"this {type(model).__name__} has adapters of loratune.attach; detach them first.")
        return found

    def place(self, model: nn.Module, site: Site, name: str, factor: LowRank) -> None:
        site = leaf(site)
        layer = self._layer(site)
        if isinstance(factor, Tied):
            factor = Tied(self.views[name][site.tied_to or ""], transposed=site.turned)
        view = self.views.setdefault(name, {})[site.path] = layer.hold(site, name, factor)
        layer.placed.setdefault(name, []).append(view)
        self.slots[site.path] = layer

    def _layer(self, site: Site) -> LoraLayer:
        """Returns the layer around a site's parameter; a new one goes next to the base's module, inside the others."""
        if site.path in self.slots:
            return self.slots[site.path]  # type: ignore[return-value]
        parent, name = parent_of(self.model, site.owner)
        while isinstance(inner := parent._modules[name], LoraLayer | ModulesToSaveWrapper):
            if site.parameter is None and isinstance(inner, LoraLayer):
                return inner
            parent, name = inner, "base_layer" if isinstance(inner, LoraLayer) else "original_module"
        if site.tokens is not None or site.path.endswith(".token_adapter"):
            tied: Any = self.slots[site.tied_to].token_adapter if site.tied_to else None
            layer: LoraLayer = TrainableTokensWrapper(site, self.shared, tied)
        else:
            layer = layer_class(site)(site, self.shared)
        parent._modules[name] = layer
        self.wrappers[site.owner] = layer
        return layer

    def activate(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self._restore_originals(model)
        for name in names:
            adapter = self.adapters[name]
            adapter.factors.update(self.views.get(name, {}))
            for path, module in adapter.saved.items():
                self._keep(path, name, module)
            for path, bias in adapter.biases.items():
                self.originals.setdefault(path, put_parameter(model, path, bias))
        self.active = names
        for layer in self.all():
            layer.set_adapter(list(names))

    def _keep(self, path: str, name: str, module: nn.Module) -> None:
        if path not in self.saved:
            parent, last = parent_of(self.model, path)
            original = parent._modules[last]
            assert original is not None
            self.saved[path] = parent._modules[last] = ModulesToSaveWrapper(original, self.shared)  # type: ignore[assignment]
        self.saved[path].modules_to_save[name] = module

    def all(self) -> list[Any]:
        """Returns every layer and wrapper of a trained module."""
        tokens = [layer.token_adapter for layer in self.slots.values() if isinstance(layer, TrainableTokensWrapper)]
        return list({id(layer): layer for layer in (*self.slots.values(), *tokens, *self.saved.values())}.values())

    # ---- adding and taking away ---------------------------------------------------------------------------------

    def add(self, name: str, config: LoraConfig, *, autocast: bool = True, on_meta: bool = False) -> None:
        """Attaches a new adapter, active if it is the first. Raises ConfigError or AdapterError, nothing attached."""
        try:
            self._check_new(name, config)
            self._add(name, config, config.checked(self.model))
        except Exception:
            if not self.adapters:
                self.unwrap(self.model)
            raise
        for layer in self.slots.values():
            if not autocast and name in layer.placed:
                _convert(layer, name, lambda tensor, like=layer.where.weight: tensor.to(like.dtype))  # type: ignore[attr-defined]
            if on_meta:
                _convert(layer, name, lambda tensor: tensor.to("meta"))
            _warn_of_bias(layer, name)
        _warn_of_ties(self.model, self.adapters[name])

    def _add(self, name: str, config: LoraConfig, what: Any) -> None:
        before = self.active
        attach(self.model, what, name, allow_base=True)
        self.peft_config[name] = config
        self.set_adapter(before or (name,), self.frozen if before else config.inference_mode)

    def _check_new(self, name: str, config: LoraConfig) -> None:
        if name in self.adapters:
            raise AdapterError(f"Adapter with name '{name}' already exists. Give another name, or delete it first.")
        if "." in name or hasattr(nn.ModuleDict, name):
            raise ConfigError(f"adapter name {name!r} cannot be a module's: no dots, no names of torch's own methods.")
        if sum(each.bias != "none" for each in (config, *self.peft_config.values())) > 1:
            raise AdapterError(
                "LoraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all "
                "adapters."
            )

    def set_adapter(self, names: Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones; they alone train, unless `inference_mode`. Raises AdapterError."""
        for name in names:
            if name not in self.adapters:
                raise AdapterError(f"Adapter {name} not found. There are {', '.join(self.adapters)}.")
        for wrapper in self.all():
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                wrapper.check_set_adapter(names)
        disabled = [layer for layer in self.all() if layer.disable_adapters]
        self.activate(self.model, tuple(names))
        self.frozen = inference_mode
        self.set_requires_grad([name for name in self.adapters if name not in names or inference_mode], False)
        for layer in disabled:
            layer.enable_adapters(False)

    def set_requires_grad(self, names: str | Sequence[str], on: bool) -> None:
        for name in [names] if isinstance(names, str) else names:
            for _, parameter in self.adapters[name].named_parameters():
                parameter.requires_grad_(on)

    def enable(self, enabled: bool) -> None:
        """Switches all adapters on or off, trained biases and modules included."""
        for layer in self.all():
            layer.enable_adapters(enabled)
        if enabled:
            self.set_adapter(self.active, self.frozen)
        else:
            self._restore_originals(self.model)

    def delete(self, name: str) -> None:
        """Forgets an adapter; where it was active, the first of the others becomes active. Raises AdapterError."""
        if name not in self.adapters:
            raise AdapterError(f"Adapter {name} does not exist. There are {', '.join(self.adapters)}.")
        if any(name in layer.merged_adapters for layer in self.all()):
            raise AdapterError(f"Cannot delete adapter(s) ['{name}'] while they are merged. Please unmerge them first.")
        left = [each for each in self.active if each != name] or [each for each in self.adapters if each != name][:1]
        self.activate(self.model, tuple(each for each in self.active if each != name))
        self.forget(name)
        self.set_adapter(left)

    def forget(self, name: str) -> None:
        for layer in self.all():
            layer.delete_adapter(name)
        del self.adapters[name], self.peft_config[name]
        self.views.pop(name, None)

    def materialize(self, name: str) -> None:
        """Gives tensors on the meta device memory beside the base layer's, filled with zeros."""
        for layer in self.slots.values():
            device: torch.device = layer.where.weight.device  # type: ignore[attr-defined, assignment]
            _convert(layer, name, lambda t, to=device: torch.zeros_like(t, device=to) if t.is_meta else t)

    # ---- merging --------------------------------------------------------------------------------------------------

    def merge(self, names: list[str] | None, safe: bool) -> int:
        """Merges these adapters, or each layer's active ones; returns how many were merged that were not before."""
        before = self._num_merged()
        for layer in self.slots.values():
            for name in layer.active_adapters if names is None else names:  # type: ignore[union-attr]
                layer.check_mergeable(name)  # type: ignore[operator]
        for layer in self.slots.values():
            layer.merge(safe, names)  # type: ignore[operator]
        return self._num_merged() - before

    def _num_merged(self) -> int:
        return sum(len(layer.merged_adapters) for layer in self.all())

    def unload(self, merge: bool, safe: bool = False, names: list[str] | None = None) -> nn.Module:
        """Takes every layer off, with the adapters' updates in the weights or without; returns the base model."""
        if merge:
            self.merge(names, safe)
        else:
            for layer in self.all():
                layer.unmerge()
                layer.enable_adapters(False)
        if merge and not any(layer.disable_adapters for layer in self.all()):
            self.originals.clear()  # trained biases stay
        kept = {path: wrapper.chosen(names) for path, wrapper in self.saved.items()} if merge else {}
        self.unwrap(self.model)
        for path, module in kept.items():
            parent, last = parent_of(self.model, path)
            parent._modules[last] = module
        tie_again(self.model, self.ties)
        settle_ties(self.model)
        return self.model

    def unwrap(self, model: nn.Module) -> None:
        self._restore_originals(model)
        for path in [*self.wrappers, *self.saved]:
            parent, last = parent_of(model, path)
            parent._modules[last] = unwrapped(parent._modules[last])  # type: ignore[arg-type]
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in self.required_grad)
        for attribute in ("_loratune", "peft_config"):
            model.__dict__.pop(attribute, None)


def _convert(layer: Any, name: str, change: Any) -> None:
    for container in layer.adapter_layer_names:
        held: Any = functools.reduce(getattr, container.split("."), layer)
        if name in held:
            for module in [held] if isinstance(held, nn.ParameterDict) else [held[name]]:
                for key, parameter in list(module._parameters.items()):
                    if parameter is not None and (module is not held or key == name):
                        module._parameters[key] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)


def _warn_of_bias(layer: Any, name: str) -> None:
    base = unwrapped(layer)
    if any(factor.bias is not None for factor in layer.placed.get(name, ())) and getattr(base, "bias", None) is None:
        warnings.warn(
            f"`lora_bias=True` was passed but the targeted layer of type {type(base).__name__} has no bias. "
            "This means that merging LoRA weights won't be possible.",
            PeftWarning,
            stacklevel=4,
        )


def _warn_of_ties(model: nn.Module, adapter: Adapter) -> None:
    """Says where an adapter changes one of several modules that share a weight, or could not tie what was wished."""
    shared = tied(model, [path for path, module in logical_modules(model) if "weight" in module._parameters])
    adapted = {path.removesuffix(f".{TOKENS}") for path in (*adapter.factors, *adapter.saved)}
    here = sorted(adapted & shared.keys())
    wanted, tieable = adapter.config.ensure_weight_tying, ties(model)
    if wanted and not adapted & {*tieable, *tieable.values()}:
        what = "are added to the adapter" if tieable else "were found in the model"
        warnings.warn(f"`ensure_weight_tying` is set, but no tied modules {what}.", PeftWarning, stacklevel=5)
    if here and not wanted and not adapter.config.trainable_token_indices:
        warnings.warn(
            f"{here[0]} shares its weight with {', '.join(shared[here[0]])}, but `ensure_weight_tying` is not set to "
            "True: the adapter changes the adapted ones alone, and merging unties them.",
            PeftWarning,
            stacklevel=5,
        )
