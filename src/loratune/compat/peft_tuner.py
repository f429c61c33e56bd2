"""LoraModel: the base model with its adapters, which PeftModel calls `base_model`."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from loratune.adapter import arithmetic
from loratune.compat.peft_attach import Layers
from loratune.compat.peft_config import LoraConfig
from loratune.errors import AdapterError


class LoraModel(nn.Module):
    """The base model with its LoRA layers; what PeftModel calls `base_model`."""

    prefix = "lora_"

    def __init__(
        self, model: nn.Module, config: Any, adapter_name: str = "default", low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        configs = config if isinstance(config, dict) else {adapter_name: config}
        for name, each in configs.items():
            self.layers_.add(name, each, autocast=autocast_adapter_dtype, on_meta=low_cpu_mem_usage)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def layers_(self) -> Layers:
        return Layers.on(self.model)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        return self.layers_.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return list(self.layers_.active)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def targeted_module_names(self) -> list[str]:
        return list(self.layers_.wrappers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter, or several whose updates add up, active."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.layers_.set_adapter(names, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.layers_.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        self.layers_.delete(adapter_name)

    def disable_adapter_layers(self) -> None:
        self.layers_.enable(False)

    def enable_adapter_layers(self) -> None:
        self.layers_.enable(True)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Puts W + s B A in W's place at every layer, until `unmerge_adapter` puts W back."""
        if self.layers_.merge(adapter_names, safe_merge) == 0:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)

    def unmerge_adapter(self) -> None:
        for layer in self.layers_.all():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Returns the base model with the adapters in its weights, no layer of PEFT's left."""
        return self.layers_.unload(True, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Returns the base model as it was."""
        return self.layers_.unload(False)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        **_: Any,
    ) -> None:
        """Adds an adapter made of others: see `loratune.adapter.arithmetic.combine`, whose scale is always 1."""
        layers = self.layers_
        if adapter_name in layers.adapters:
            raise AdapterError(f"Adapter with name '{adapter_name}' already exists. Give another name.")
        for name in adapters:
            if name not in layers.adapters:
                raise AdapterError(f"Adapter {name} does not exist. There are {', '.join(layers.adapters)}.")
        sources = [layers.adapters[name] for name in adapters]
        saved = [path for source in sources for path in source.saved]
        twice = {path for path in saved if saved.count(path) > 1}
        if twice:
            raise AdapterError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{len(twice)} such instance(s)."
            )
        method = "cat" if len(adapters) == 1 else combination_type
        combined = arithmetic.combine(
            [replace(source, saved={}) for source in sources], weights, method, density=density,
            rank=svd_rank if arithmetic.METHODS[method].truncates else None, majority_sign_method=majority_sign_method,
        )  # fmt: skip
        combined.saved = {path: copy.deepcopy(module) for source in sources for path, module in source.saved.items()}
        combined.config = combined.config.with_(modules_to_save=tuple(saved) or None)
        layers._add(adapter_name, _mutable(layers.peft_config[adapters[0]], combined.config), combined)


def _mutable(like: LoraConfig, checked: Any) -> LoraConfig:
    return replace(
        like, r=checked.r, lora_alpha=checked.lora_alpha, rank_pattern=dict(checked.rank_pattern),
        alpha_pattern=dict(checked.alpha_pattern), target_modules=list(checked.target_modules), use_rslora=False,
        modules_to_save=list(checked.modules_to_save or ()) or None, layers_to_transform=None, layers_pattern=None,
        exclude_modules=None, init_lora_weights=True,
    )  # fmt: skip
