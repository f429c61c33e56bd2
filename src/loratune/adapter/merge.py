"""Merging: W' = W + s B A, added in float32 and rounded once. Plan first, from names and shapes; then apply."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loratune.adapter import sites
from loratune.adapter.factor import LowRank
from loratune.adapter.hosts import Host
from loratune.adapter.modules import parameter_at, put_parameter, ties
from loratune.adapter.variants import merged
from loratune.errors import AdapterError

if TYPE_CHECKING:
    from loratune.adapter.attach import Attached


@dataclass(frozen=True)
class Loss:
    """What the final rounding lost of an update: |W' - W - s B A| / |s B A| over all entries (Frobenius norms)."""

    error_squared: float = 0.0
    update_squared: float = 0.0

    @classmethod
    def of(cls, error: Tensor, update: Tensor) -> "Loss":
        return cls(float(error.double().square().sum()), float(update.double().square().sum()))

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error_squared + other.error_squared, self.update_squared + other.update_squared)

    @property
    def share(self) -> float:
        return (self.error_squared / self.update_squared) ** 0.5 if self.update_squared else 0.0


def merged_weight(weight: Tensor, factor: LowRank, host: Host) -> tuple[Tensor, Loss]:
    """Returns W + s B A in W's type, and what rounding lost. The sum is formed in float32 (float64 for float64)."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    wide = weight.detach().to(exact)
    with torch.no_grad():
        delta = merged(host, wide, factor) - wide if factor.magnitude is not None else host.oriented(factor.delta())
    return added(weight, delta.to(weight.device, exact), weight.dtype)


def added(weight: Tensor, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Loss]:
    """Returns W + delta, formed in delta's type and rounded once to `dtype`, and what rounding lost."""
    wide = weight.detach().to(delta.dtype)
    rounded = (wide + delta).to(dtype)
    return rounded, Loss.of((rounded.to(delta.dtype) - wide) - delta, delta)


def merge_in_memory(attached: "Attached") -> nn.Module:
    """Puts the update of one adapter into its model's weights and takes every wrapper off; returns the model.

    Weights get new tensors, so a weight that two modules share is untied and `tie_word_embeddings` is set to False.
    """
    from loratune.adapter.attach import Attachments  # the handle's module imports this one

    model, adapter = attached.model, attached.adapter
    everything = Attachments.of(model)
    assert everything is not None
    if len(everything.adapters) > 1:
        others = ", ".join(name for name in everything.adapters if name != attached.name)
        raise AdapterError(
            f"merging {attached.name!r} would drop the other attached adapters: {others}. Detach them first."
        )
    everything.activate(model, ())
    found, shared = sites.find(model, adapter.config), ties(model)
    _check_mergeable(found, adapter.factors)
    for site in found:
        put_merged(site, adapter.factors[site.path])
    tie_again(model, shared)
    everything.activate(model, (attached.name,))
    everything.originals.clear()  # trained biases and modules stay where they are
    everything.unwrap(model)
    settle_ties(model)
    return model


def settle_ties(model: nn.Module) -> None:
    """Makes a transformers model whose tied weights differ after a merge say that they are not tied any more."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", {})  # transformers keeps them, and saves by them
    if any(parameter_at(model, one) is not parameter_at(model, other) for one, other in pairs.items()):
        _untie(model, pairs)


def tie_again(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Makes weights that were one (see `ties`) one parameter again where merging left them equal."""
    for path, leader in shared.items():
        weight, other = parameter_at(model, f"{path}.weight"), parameter_at(model, f"{leader}.weight")
        if weight is not None and other is not None and torch.equal(weight, other):
            put_parameter(model, f"{path}.weight", other)


def _check_mergeable(found: Iterable[sites.Site], factors: Mapping[str, LowRank]) -> None:
    """Raises AdapterError if a layer has no bias to which the trained bias of its factor could be added.

    It is not given one: a model that is saved and loaded again by its own class would drop it silently.
    """
    for site in found:
        if factors[site.path].bias is not None and getattr(site.module, "bias", None) is None:
            raise AdapterError(
                f"{site.path} has no bias, so the trained bias of its factor (lora_bias) cannot be merged: a saved "
                "model would lose it. Keep the adapter apart, or train without lora_bias. Nothing was merged."
            )


def put_merged(site: sites.Site, factor: LowRank) -> None:
    """Gives a layer a new weight with the update in it (and a new bias, where the factor trains one)."""
    owner, _, name = (site.parameter or "weight").rpartition(".")
    holder = site.module.get_submodule(owner)
    weight = site.weight
    value, _ = merged_weight(weight, factor, site.host)
    holder._parameters[name] = nn.Parameter(value, requires_grad=weight.requires_grad)
    if factor.bias is not None:
        bias = holder._parameters["bias"]
        assert bias is not None, "checked before merging"
        total = bias.detach() + (factor.bias.detach() * factor.scale).to(bias)
        holder._parameters["bias"] = nn.Parameter(total, requires_grad=bias.requires_grad)


def _untie(model: nn.Module, pairs: dict[str, str]) -> None:
    """Makes a model whose tied weights differ by now say so. transformers knows one switch for all pairs, so those
    that are equal still (BART ties four) get tensors of their own: else they would be missing from what is saved."""
    for path, other in pairs.items():
        parameter = parameter_at(model, path)
        if parameter is not None and parameter is parameter_at(model, other):
            owner, _, name = path.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            model.get_submodule(owner)._parameters[name] = own
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    model.__dict__["all_tied_weights_keys"] = {}
