"""EVA: A begins in the directions that a layer's inputs vary in most, and ranks go where they explain most.

Paischer et al. 2024, arXiv 2410.07170. The rows of A are the leading right singular vectors of the layer's inputs X on
some batches; the rank budget r x layers is then shared out by the share of variance each direction explains, at most
rho r to a layer. B is zero, so step 0 equals the base model; what is saved is plain LoRA with a rank_pattern.

Shapes: T tokens, I inputs, R rank. Memory: one (I, I) matrix of second moments for each distinct layer input.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter import sites
from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.adapter.fingerprint import fingerprint
from loratune.adapter.hosts import needs_float32
from loratune.adapter.sites import Site
from loratune.errors import ConfigError


def eva(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    rho: float = 2.0,
    keep: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
) -> Adapter:
    """Returns an adapter that begins as EVA says, to be attached: `attach(model, eva(model, config, batches))`.

    batches: keyword inputs of the model's forward. rho >= 1: the most a layer's rank may grow (1: every rank stays r).
    keep(batch) -> bool mask of the tokens that count, flattened to (T,); by default all, less those that
    `attention_mask` leaves out. The scale of every layer stays that of `config`.
    Raises ConfigError for layers that are not linear, no batches, or fewer tokens than rho r.
    """
    if rho < 1:
        raise ConfigError(f"rho is {rho}; expected a number of at least 1.")
    found = sites.find(model, config)
    other = next((site for site in found if not site.is_layer or site.host.kind not in ("Linear", "Conv1D")), None)
    if other is not None:
        raise ConfigError(f"EVA needs linear layers; {other.path} is a {type(other.module).__name__}.")
    moments = _second_moments(model, found, batches, keep or _not_padding)
    directions = {site.path: _directions(site, moments[site.path], rho) for site in found}
    ranks = _shared_out(found, {path: share for path, (share, _) in directions.items()})
    chosen = [site for site in found if ranks[site.path]]
    factors = {site.path: _factor(site, directions[site.path][1][: ranks[site.path]], config) for site in chosen}
    return Adapter(_with_ranks(config, chosen, ranks), factors, base=fingerprint(model))


def _not_padding(batch: Mapping[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones(batch["input_ids"].numel(), dtype=torch.bool) if mask is None else mask.flatten().bool()


@torch.no_grad()
def _second_moments(
    model: nn.Module,
    found: list[Site],
    batches: Iterable[Mapping[str, Tensor]],
    keep: Callable[[Mapping[str, Tensor]], Tensor],
) -> dict[str, Tensor]:
    """Returns X^T X of each site's inputs, (I, I) in float32, over all batches."""
    moments: dict[str, Tensor] = {}
    mask = torch.empty(0, dtype=torch.bool)

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            x = x[mask.to(x.device)] if len(mask) == len(x) else x
            moments[path] = moments[path].addmm_(x.T, x) if path in moments else x.T @ x

        return hook

    handles = [site.module.register_forward_pre_hook(watch(site.path)) for site in found]
    try:
        for batch in batches:
            mask = keep(batch)
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = [site.path for site in found if site.path not in moments]
    if missing:
        raise ConfigError(f"EVA saw no input of {len(missing)} layers; first: {missing[0]}. Give at least one batch.")
    return moments


def _directions(site: Site, moment_II: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Returns (the share of variance each leading direction explains, the directions as rows)."""
    variances, vectors = torch.linalg.eigh(moment_II)
    number = min(round(site.rank * rho), len(variances))
    variances = variances.flip(0)[:number].clamp_min(0)
    if int((variances > 1e-6 * variances[0]).sum()) < number:  # float32 leaves about 1e-7 of a direction that is none
        raise ConfigError(f"EVA found fewer than {number} directions in the inputs of {site.path}. Give more tokens.")
    return variances / moment_II.diagonal().sum(), vectors.flip(1)[:, :number].T


def _shared_out(found: list[Site], shares: dict[str, Tensor]) -> dict[str, int]:
    """Gives the budget, the sum of all ranks, to the directions that explain most, whichever layer they are in."""
    everything = torch.cat([shares[site.path] for site in found])
    owners = torch.cat([torch.full((len(shares[site.path]),), index) for index, site in enumerate(found)])
    best = everything.argsort(descending=True, stable=True)[: sum(site.rank for site in found)]
    counts = torch.bincount(owners[best], minlength=len(found)).tolist()
    return {site.path: count for site, count in zip(found, counts, strict=True)}


def _factor(site: Site, rows_RI: Tensor, config: LoraConfig) -> LowRank:
    dtype = needs_float32(site.weight)
    B = torch.zeros(site.sizes[1], len(rows_RI), dtype=dtype)
    return LowRank(rows_RI.to(dtype).contiguous(), B, site.scale, config.lora_dropout)


def _with_ranks(config: LoraConfig, chosen: list[Site], ranks: dict[str, int]) -> LoraConfig:
    """A rank for each layer, and the alpha that keeps its scale."""
    key = {site.path: "^" + re.escape(site.path) for site in chosen}
    root = (lambda rank: rank**0.5) if config.use_rslora else (lambda rank: rank)  # pyright: ignore
    return config.with_(
        target_modules=tuple(site.path for site in chosen),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={key[site.path]: ranks[site.path] for site in chosen},
        alpha_pattern={key[site.path]: site.scale * root(ranks[site.path]) for site in chosen},
    )
