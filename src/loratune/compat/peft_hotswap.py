"""Hot-swapping: another adapter's values in an attached one, tensors and layers staying what they are."""

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.adapter import making, sites
from loratune.adapter.config import LoraConfig as CheckedConfig
from loratune.adapter.factor import LowRank, TokenRows
from loratune.adapter.peft_format import decode, encode
from loratune.compat.peft_attach import Layers
from loratune.compat.peft_config import LoraConfig
from loratune.compat.peft_state import SizeMismatchError, layers_of, load_peft_weights, normal_key
from loratune.compat.peft_views import View
from loratune.errors import AdapterError, ConfigError

_COMPILED = (
    "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely result in "
    "re-compilation, hurting performance. Call the function before compiling the model."
)


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any
) -> None:
    """Puts another adapter's values into an attached one, tensors and layers staying what they are.

    Smaller ranks are filled up with zeros, layers the new adapter lacks get zeros, a larger rank gets new tensors.
    Raises SizeMismatchError, nothing swapped, for a tensor the attached one lacks.
    """
    layers = layers_of(model)
    if any(adapter_name in layer.merged_adapters for layer in layers.all()):
        raise AdapterError(f"Cannot hot-swap adapter '{adapter_name}' because it is merged. Unmerge it first.")
    config: LoraConfig = LoraConfig.from_pretrained(model_name_or_path, **kwargs)
    _check_alike(layers.peft_config[adapter_name], config)
    tensors = {normal_key(key): value for key, value in load_peft_weights(model_name_or_path, **kwargs).items()}
    known = encode(layers.adapters[adapter_name], layers.model)[1]
    unexpected = [re.sub(r"(\.lora_\w+)", rf"\1.{adapter_name}", key, count=1) for key in tensors if key not in known]
    if unexpected:
        raise SizeMismatchError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}."
        )
    read = decode(config.checked(layers.model), tensors, None, Path(model_name_or_path))
    if set(read.loose) - {f"{path}.trainable_tokens_delta" for path in layers.views[adapter_name]}:
        raise AdapterError(f"{model_name_or_path} also trains {next(iter(read.loose))}, which hot-swapping leaves out.")
    read = making.fitted_to(read, sites.find(layers.model, read.config))
    for path, view in _views(layers, adapter_name).items():
        new = read.factors.get(path)
        zeros = LowRank(torch.zeros_like(view.A), torch.zeros_like(view.B), float(view.scale), groups=view.groups)
        view.take(zeros if new is None else _padded(new, max(view.rank, new.rank)))
        view.set_scale(float(view.scale) if new is None else new.scale)
    _state(layers, adapter_name)


def _check_alike(one: LoraConfig, other: LoraConfig) -> None:
    for name in ("use_rslora", "lora_dropout", "use_dora", "lora_bias"):
        if getattr(one, name) != getattr(other, name):
            raise AdapterError(f"Configs are incompatible: for {name}, {getattr(one, name)} != {getattr(other, name)}")


def _views(layers: Layers, name: str) -> dict[str, Any]:
    """Returns the factors of an adapter that have tensors of their own, by path."""
    return {path: view for path, view in layers.views.get(name, {}).items() if isinstance(view, View | TokenRows)}


def _padded(factor: LowRank, rank: int) -> LowRank:
    """Returns a factor of a larger rank with the same update: zeros after each group's rows of A and columns of B."""
    groups, missing = factor.groups, (rank - factor.rank) // factor.groups
    A = factor.A.detach().unflatten(0, (groups, -1))
    A = torch.cat([A, A.new_zeros(groups, missing, *A.shape[2:])], 1).flatten(0, 1)
    B = torch.cat([factor.B.detach(), factor.B.new_zeros(len(factor.B), missing)], 1)
    return LowRank(A, B, factor.scale, bias=factor.bias, magnitude=factor.magnitude, groups=groups)


def _state(layers: Layers, name: str) -> None:
    """Makes an adapter's configuration, which is saved, state the ranks and scales that its factors have by now."""
    config = layers.adapters[name].config
    views = {path: view for path, view in _views(layers, name).items() if isinstance(view, View)}
    ranks = {path: view.rank for path, view in views.items()}
    alphas = {path: _alpha(config, view) for path, view in views.items()}
    if views:
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        layers.adapters[name].config = config.with_(
            r=r, rank_pattern={re.escape(path): rank for path, rank in ranks.items() if rank != r},
            lora_alpha=alpha, alpha_pattern={re.escape(path): own for path, own in alphas.items() if own != alpha},
        )  # fmt: skip


def _alpha(config: CheckedConfig, view: LowRank) -> float:
    return float(view.scale) * (math.sqrt(view.rank) if config.use_rslora else view.rank)


def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Makes hot-swapping adapters of other ranks and scales change no shape and no number of a compiled model.

    Scales become tensors and, with `target_rank`, factors are filled up with zeros; the output stays what it is.
    Raises ConfigError with nothing changed; `config`, one or a dict of them, is told the new rank.
    """
    _check_compiled(model, check_compiled)
    try:
        layers = layers_of(model)
    except AdapterError as error:
        raise ConfigError(
            "No adapter layers found on the model, make sure to call `prepare_model_for_compiled_hotswap` after "
            "loading the first adapter and before loading the second adapter."
        ) from error
    views = [view for name in layers.adapters for view in _views(layers, name).values() if isinstance(view, View)]
    padded = [view for view in views if view.B.ndim == 2] if target_rank is not None else []
    for view in padded:
        _check_rank(view, target_rank or 0)
    for view in padded:
        view.take(_padded(view, target_rank or 0))
    for view in views:
        view.set_scale(view.scale)
        view.scale = torch.tensor(view.scale, device=view.A.device)  # type: ignore[assignment]
    for name in layers.adapters:
        _state(layers, name)
    if config and target_rank is not None:
        for each in config.values() if isinstance(config, Mapping) else [config]:
            each.r = target_rank
            each.rank_pattern = dict.fromkeys(each.rank_pattern or {}, target_rank)


def _check_compiled(model: nn.Module, wish: str) -> None:
    if wish not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{wish}' instead.")
    if not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)):
        return
    if wish == "error":
        raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if wish == "warn":
        warnings.warn(_COMPILED, stacklevel=3)


def _check_rank(view: LowRank, rank: int) -> None:
    if rank % view.groups:
        raise ConfigError(
            f"Trying to pad a Conv2d LoRA adapter with groups={view.groups} to target rank {rank}, but the target rank "
            f"is not divisible by {view.groups}. Please choose a target rank that is divisible by {view.groups}."
        )
    if rank < view.rank:
        raise ConfigError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({view.rank}). "
            "This is not possible."
        )
