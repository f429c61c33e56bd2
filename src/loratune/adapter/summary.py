"""What an adapter trains on a model, said in words: settings, parameters, coverage, and what a reader must know."""

from collections.abc import Sequence

from torch import Tensor, nn

from loratune.adapter import roles
from loratune.adapter.adapter import Adapter
from loratune.adapter.matching import within
from loratune.adapter.modules import logical_modules, tied, ties
from loratune.adapter.sites import Site, find


def summarize(model: nn.Module, adapter: Adapter) -> str:
    """Returns the table of what is trained: settings, parameters, role coverage, and what a reader must know."""
    config, found = adapter.config, find(model, adapter.config)
    trained = adapter.num_parameters()
    own = {id(parameter) for _, parameter in adapter.named_parameters()}
    total = sum(p.numel() for p in {id(p): p for p in model.parameters() if id(p) not in own}.values())
    lines = [
        f"LoRA on {type(model).__name__}: {len(found)} sites, r={config.r}, lora_alpha={config.lora_alpha:g}, "
        f"scale {config.lora_alpha / config.r:g}, dropout {config.lora_dropout:g}, bias {config.bias}",
        f"trainable parameters: {trained:,} of {total + trained:,} ({trained / (total + trained):.4%})",
        *coverage(model, adapter).render().splitlines(),
        *(f"rows trained: {len(site.tokens)} of {site.owner}" for site in found if site.tokens and not site.tied_to),
        *(f"weights adapted inside {site.owner}: {site.parameter}" for site in found if site.parameter),
        *(f"trained whole: {path}" for path in adapter.saved),
        *(f"tied: {site.owner} takes the update of {site.tied_to}" for site in found if site.tied_to),
        *(f"tied: {path} and {leader} are one trained tensor" for path, leader in _saved_as_one(model, adapter)),
        *notes(model, adapter),
    ]
    return "\n".join(lines)


def coverage(model: nn.Module, adapter: Adapter) -> roles.Coverage:
    """Returns the map role x layer of the adapted layers; token rows and weights inside a module are no layers."""
    found = find(model, adapter.config)
    return roles.coverage(model, [site.path for site in found if site.is_layer])


def notes(model: nn.Module, adapter: Adapter) -> list[str]:
    """Returns what is allowed but worth knowing: ranks above a layer's side, tied weights that merging unties."""
    found: list[str] = []
    modules = dict(logical_modules(model))
    found_sites = find(model, adapter.config)
    high = [site.path for site in found_sites if site.tokens is None and site.rank > min(site.sizes)]
    if high:
        found.append(
            f"note: r is above the smaller side of {len(high)} layers (first: {high[0]}); more than full rank."
        )
    wished = adapter.config.ensure_weight_tying
    if wished and not any(site.tied_to for site in found_sites) and not _saved_as_one(model, adapter):
        found.append("note: ensure_weight_tying has nothing to tie: no trained module shares its weight with another.")
    for path, others in tied(
        model, [site.owner for site in found_sites if not site.parameter and not _stays_tied(site, found_sites)]
    ).items():
        weight: Tensor = modules[path].weight  # type: ignore[assignment]
        megabytes = weight.numel() * weight.element_size() / 1e6
        found.append(
            f"note: {path} shares its weight with {', '.join(others)}; the adapter changes {path} alone. "
            f"Merging unties them and adds {weight.numel():,} parameters ({megabytes:,.0f} MB)."
        )
    return found


def _stays_tied(site: Site, found: Sequence[Site]) -> bool:
    """Whether both uses of a shared weight get the same update (`ensure_weight_tying`, trained token rows)."""
    return site.tied_to is not None or any(other.tied_to == site.path for other in found)


def _saved_as_one(model: nn.Module, adapter: Adapter) -> list[tuple[str, str]]:
    """Returns (module, the module it is tied to) of those that are trained whole as one tensor."""
    shared = ties(model).items() if adapter.config.ensure_weight_tying else ()
    return [(path, leader) for path, leader in shared if within(leader, adapter.saved)]
