"""Wrappers around what an adapter trains other than by a factor: whole modules, and rows of an embedding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter.factor import LowRank, Tied, TokenRows
from loratune.adapter.sites import Site
from loratune.adapter.wrapper import Shared, Wrapper, unwrapped
from loratune.compat.peft_layers import BaseTunerLayer, LoraLayer
from loratune.compat.peft_views import RowsView, Tensors
from loratune.errors import AdapterError, ConfigError

MIXED_BATCH_MODULES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AuxiliaryTrainingWrapper(Wrapper, BaseTunerLayer):
    """What stands around a module that an adapter trains other than by a factor."""

    shared: Shared

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in super().active_adapters if name in self.adapter_names()]

    @property
    def _adapters(self) -> set[str]:
        return set(self.adapter_names())

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        """Raises AdapterError if more than one of these adapters is here: their copies cannot be added."""
        here = [name for name in adapter_names if name in self.adapter_names()]
        if len(here) > 1:
            raise AdapterError(
                f"Only one adapter can be set at a time for {type(self).__name__}, got {len(here)}: {here}."
            )


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module of the base and the copies of it that adapters train (`modules_to_save`)."""

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, original: nn.Module, shared: Shared) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.shared = shared
        self.merged_adapters = []
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.chosen(), name)

    @property
    def base(self) -> nn.Module:  # type: ignore[override]
        return self.original_module

    def adapter_names(self) -> list[str]:
        return list(self._modules["modules_to_save"])  # type: ignore[arg-type]

    def chosen(self, names: Sequence[str] | None = None) -> nn.Module:
        """Returns the module that computes: the copy of an active (or named) adapter, else the base's."""
        copies: Any = self._modules["modules_to_save"]
        wanted = self.active_adapters if names is None else [name for name in names if name in copies]
        return self._modules["original_module"] if self._disable_adapters or not wanted else copies[wanted[0]]  # type: ignore[return-value]

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self.shared.rows is None or self._disable_adapters:
            return self.chosen()(x, *args, **kwargs)
        if not isinstance(unwrapped(self), MIXED_BATCH_MODULES):
            names = ", ".join(kind.__name__ for kind in MIXED_BATCH_MODULES)
            raise TypeError(f"Mixed batching is only supported for the following modules: {names}.")
        y = self.original_module(x, *args, **kwargs)
        for name, index in self.shared.rows.items():
            if name in self.modules_to_save:
                y = y.index_copy(0, index, self.modules_to_save[name](x[index], *args, **kwargs))
        return y


class TokenAdapter(nn.Module, BaseTunerLayer):
    """The rows of an embedding that adapters train, by name: `trainable_tokens_delta` holds the rows themselves."""

    adapter_layer_names = ("trainable_tokens_delta",)

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.trainable_tokens_delta = nn.ParameterDict()
        self.one_hot = nn.ModuleDict()
        self.trainable_tokens_original: dict[str, Tensor] = {}
        self.token_indices: dict[str, list[int]] = {}
        self.merged_adapters = []
        self.in_features, self.out_features = base.weight.shape  # type: ignore[misc]

    def adapter_names(self) -> list[str]:
        return list(self.trainable_tokens_delta)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for held in (self.one_hot, self.trainable_tokens_original, self.token_indices):
            if adapter_name in held:
                del held[adapter_name]


class TrainableTokensWrapper(LoraLayer, AuxiliaryTrainingWrapper):
    """An embedding with trained rows, or the head that shares its weight with one."""

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(self, site: Site, shared: Shared, tied: TokenAdapter | None = None) -> None:
        super().__init__(site, shared)
        for name in list(self._modules):
            del self._modules[name]
        self.token_adapter = TokenAdapter(site.module) if tied is None else tied
        self.__dict__["own_base"] = site.module if tied is not None else None

    @property
    def base(self) -> nn.Module:  # type: ignore[override]
        return self.__dict__["own_base"] or self.token_adapter.base_layer

    original_module = base_layer = base

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            tokens: Any = nn.Module.__getattr__(self, "token_adapter")
            return getattr(tokens.base_layer, name)

    def trained(self, name: str) -> Iterator[nn.Parameter]:
        return self.token_adapter.trained(name)

    def hold(self, site: Site, name: str, factor: LowRank) -> LowRank:
        if isinstance(factor, Tied):
            return factor
        if not isinstance(factor, TokenRows):
            raise ConfigError(f"{site.owner} has trainable_token_indices, so it cannot be a target of LoRA as well.")
        index = torch.as_tensor(site.tokens, device=site.weight.device)
        rows = site.weight.detach()[index].to(factor.B.dtype) + factor.B.detach().T.to(index.device)
        tokens = self.token_adapter
        tokens.trainable_tokens_delta[name] = nn.Parameter(rows)
        tokens.trainable_tokens_original[name] = site.weight.detach()[index].clone()
        tokens.token_indices[name] = list(site.tokens or ())
        tokens.one_hot[name] = Tensors(start=(factor.A.to(index.device), factor.A.new_empty(0)))
        return RowsView(self, name, factor)

    def delete_adapter(self, adapter_name: str) -> None:
        self.token_adapter.delete_adapter(adapter_name)
        self.placed.pop(adapter_name, None)
