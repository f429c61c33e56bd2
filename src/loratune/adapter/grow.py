"""Growing an adapter: it becomes the beginning of a larger one that computes the same, with room to learn more.

More rank: new rows of A begin as the configuration says and new columns of B at zero (of an embedding the other way
round), and s = alpha / r stays. More sites: they begin at B = 0. So s B A is what it was, and training goes on from it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loratune.adapter import making, sites
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.adapter.fingerprint import fingerprint
from loratune.adapter.sites import Site
from loratune.errors import ConfigError

_INITS = (True, "gaussian")  # B A = 0 for every part of the rank; other beginnings are zero as a whole only, or not
_SAME = ("use_dora", "ensure_weight_tying", "trainable_token_indices")  # with another one the output would be another


def grow(attached: Attached, config: LoraConfig, *, seed: int) -> Attached:
    """Puts a larger adapter in the place of an attached one and returns its handle; the model's output stays.

    `seed` fixes how the new rows of A begin, each site by its own path, as in `attach`. Raises as `check_growth`, with
    nothing changed.
    """
    model = attached.model
    with attached.disabled():
        check_growth(model, attached.config, config)
        found = sites.find(model, config)
        base = attached.adapter.base or fingerprint(model)
        adapter = making.new_adapter(model, config, found, base, seed)
    larger = dict(adapter.named_parameters())
    with torch.no_grad():
        for name, parameter in attached.adapter.named_parameters():
            corner(larger[name], parameter.shape).copy_(parameter)
    attached.detach()
    return attach(model, adapter, attached.name)


def corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the view of a grown tensor that what it has grown from, of this shape, stands in."""
    for axis, size in enumerate(shape):
        tensor = tensor.narrow(axis, 0, size)
    return tensor


def check_growth(model: nn.Module, before: LoraConfig, after: LoraConfig) -> None:
    """Raises ConfigError unless an adapter of one configuration can be the beginning of one of the other.

    Refused are a lower rank, another s, a layer, bias or module that would not be trained any more, and beginnings
    that change the output. The model is one without active adapters.
    """
    if after.init_lora_weights not in _INITS:
        raise ConfigError(
            f"init_lora_weights={after.init_lora_weights!r} cannot grow: what it begins with is not zero in each part "
            "of the rank, so the output would change. Use True or 'gaussian'."
        )
    for name in _SAME:
        if (was := getattr(before, name)) != (now := getattr(after, name)):
            raise ConfigError(
                f"{name} is {was!r} and cannot become {now!r} as an adapter grows: the output would change."
            )
    old = {site.path: site for site in sites.find(model, before)}
    new = {site.path: site for site in sites.find(model, after)}
    _check_kept(model, before, after, old, new)
    for path, site in old.items():
        _check_site(site, new[path])


def _check_kept(
    model: nn.Module, before: LoraConfig, after: LoraConfig, old: dict[str, Site], new: dict[str, Site]
) -> None:
    kept = {*new, *sites.bias_paths(model, after, [*new.values()]), *sites.saved_paths(model, after)}
    trained = [*old, *sites.bias_paths(model, before, [*old.values()]), *sites.saved_paths(model, before)]
    lost = [path for path in trained if path not in kept]
    if lost:
        raise ConfigError(
            f"an adapter cannot grow by losing what it trains: {len(lost)} of {len(trained)} are not in the larger "
            f"one; first: {lost[0]}. Give it every target of the smaller one."
        )


def _check_site(old: Site, new: Site) -> None:
    if new.rank < old.rank:
        raise ConfigError(f"{old.path}: an adapter cannot grow from r={old.rank} to r={new.rank}. Give a larger r.")
    if not math.isclose(new.scale, old.scale, rel_tol=1e-12):
        raise ConfigError(
            f"{old.path}: s = {old.scale:g} would become {new.scale:g} as r grows from {old.rank} to {new.rank}, which "
            "changes the output. Let lora_alpha grow as r does, or with use_rslora as its square root."
        )
    if new.rank > old.rank and new.groups > 1:
        raise ConfigError(f"{old.path} is a convolution in {new.groups} groups, whose rank cannot grow. Leave it out.")
