"""Sites: which layers of a model an adapter stands at. A target that matches nothing is an error, never a silence."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from loratune.adapter import roles
from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig, pattern_matches
from loratune.adapter.fingerprint import Fingerprint
from loratune.adapter.hosts import HOST_KINDS, Host, host_of
from loratune.adapter.wrapper import Adapted, unwrapped
from loratune.errors import AdapterError, ConfigError

_LAYER_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Site:
    """One layer that gets a factor: where it is, what kind it is, and the factor's sizes and scale."""

    path: str
    module: nn.Module
    host: Host
    rank: int
    scale: float

    @property
    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs) of the layer."""
        return self.host.sizes(self.module)


def logical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) as the plain model has them: wrappers are looked through, factors left out."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, Adapted):
            inside = (*inside, path + ".")
        yield path, unwrapped(module)


def owner_of(model: nn.Module, path: str) -> nn.Module:
    """Returns the module that owns the parameter at a path, looked for through wrappers."""
    return unwrapped(model.get_submodule(path.rpartition(".")[0]))


def find(model: nn.Module, config: LoraConfig) -> list[Site]:
    """Returns the sites a configuration selects, in the model's order, by PEFT's matching rules.

    Raises ConfigError if a target, an excluded name, a pattern or a layer index matches nothing (nearest names are
    given), or if a target is a kind of layer no factor can be attached to.
    """
    modules = dict(logical_modules(model))
    saved = saved_paths(model, config)
    chosen = [path for path in _targets(model, config, modules) if not _within(path, saved)]
    chosen = _in_layers(_without_excluded(chosen, config, modules), config)
    if not chosen and config.target_modules:
        raise ConfigError(
            f"target_modules={_shown(config.target_modules)} leaves no layer of {type(model).__name__} to adapt."
        )
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(pattern, path) for path in chosen):
            raise ConfigError(
                f"pattern {pattern!r} matches none of the {len(chosen)} adapted layers.{_near(pattern, chosen)}"
            )
    return [_site(path, modules[path], config) for path in chosen]


def _site(path: str, module: nn.Module, config: LoraConfig) -> Site:
    host = host_of(module)
    if host is None:
        raise ConfigError(
            f"target {path} is a {type(module).__name__}; a factor can be attached to {', '.join(HOST_KINDS)}. "
            "Nothing was attached."
        )
    return Site(path, module, host, config.rank(path), config.scale(path))


def _targets(model: nn.Module, config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    targets = config.target_modules
    if not targets:
        return []
    if isinstance(targets, tuple):
        return _named(targets, modules, "target_modules", type(model).__name__)
    if targets in roles.PRESETS:
        return roles.select(model, targets)
    if targets.lower() == "all-linear":
        head = {path for path, names in roles.module_roles(model).items() if "head" in names}
        return [p for p, m in modules.items() if _is_linear(m) and p not in head and not _is_classifier(p, config)]
    return _by_pattern(targets, modules, "target_modules", type(model).__name__)


def _is_linear(module: nn.Module) -> bool:
    host = host_of(module)
    return host is not None and host.kind != "Embedding"


def _is_classifier(path: str, config: LoraConfig) -> bool:
    """A new classification head is trained whole (modules_to_save), never by a factor (PEFT's rule)."""
    return config.task_type in ("SEQ_CLS", "TOKEN_CLS") and path.split(".")[0] in ("score", "classifier")


def matches(name: str, path: str) -> bool:
    """PEFT's rule for a list: the whole path, or its end from a dot on."""
    return path == name or path.endswith("." + name)


def _named(names: Sequence[str], modules: Iterable[str], what: str, where: str) -> list[str]:
    paths = [path for path in modules if path]
    chosen: set[str] = set()
    for name in names:
        hits = [path for path in paths if matches(name, path)]
        if not hits:
            raise ConfigError(
                f"{what}: no layer of {where} is named {name!r}.{_near(name, paths)} Nothing was attached."
            )
        chosen.update(hits)
    return [path for path in paths if path in chosen]


def _by_pattern(pattern: str, modules: Iterable[str], what: str, where: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{what}={pattern!r} is not a regular expression: {error}.") from error
    chosen = [path for path in modules if path and expression.fullmatch(path)]
    if not chosen:
        raise ConfigError(
            f"{what}={pattern!r} is a regular expression for whole paths and matches none of {where}'s layers."
            f"{_near(pattern, modules)} For names, give a list: [{pattern!r}]."
        )
    return chosen


def _without_excluded(chosen: list[str], config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    excluded = config.exclude_modules
    if not excluded:
        return chosen
    find_excluded = _by_pattern if isinstance(excluded, str) else _named
    gone = set(find_excluded(excluded, modules, "exclude_modules", "the model"))  # type: ignore[arg-type]
    if not gone & set(chosen):
        raise ConfigError(f"exclude_modules={_shown(excluded)} excludes none of the {len(chosen)} targeted layers.")
    return [path for path in chosen if path not in gone]


def _in_layers(chosen: list[str], config: LoraConfig) -> list[str]:
    layers = config.layers_to_transform
    if not layers:
        return chosen
    index_of = {path: _layer_index(path, config.layers_pattern) for path in chosen}
    missing = sorted(set(layers) - {index for index in index_of.values() if index is not None})
    if missing:
        found = sorted({index for index in index_of.values() if index is not None})
        raise ConfigError(f"layers_to_transform: no targeted layer has index {missing[0]}; found {_ranges(found)}.")
    exact = set(config.target_modules)
    return [path for path in chosen if path in exact or index_of[path] in layers]


def _layer_index(path: str, patterns: tuple[str, ...] | None) -> int | None:
    if not patterns:
        found = _LAYER_INDEX.search(path)
        return int(found[1]) if found else None
    for pattern in patterns:
        found = re.match(rf".*\.{pattern}\.(\d+)\.", "." + path)
        if found:
            return int(found[1])
    return None


def saved_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Returns the modules that `modules_to_save` names: trained and saved in full. Raises ConfigError for no match."""
    names = config.modules_to_save
    return _named(names, dict(logical_modules(model)), "modules_to_save", type(model).__name__) if names else []


def bias_paths(model: nn.Module, config: LoraConfig, sites: Sequence[Site]) -> list[str]:
    """Returns the parameter paths that `bias` trains: all biases, or those of the adapted layers.

    Raises ConfigError if there is none: the wish could not be met.
    """
    if config.bias == "none":
        return []
    modules = dict(logical_modules(model)) if config.bias == "all" else {site.path: site.module for site in sites}
    saved = saved_paths(model, config)
    found = [
        f"{path}.bias"
        for path, module in modules.items()
        if isinstance(getattr(module, "bias", None), nn.Parameter) and not _within(path, saved)
    ]
    if not found:
        raise ConfigError(f'bias={config.bias!r}, but {type(model).__name__} has no such bias. Use bias="none".')
    return found


def match(model: nn.Module, adapter: Adapter, base: Fingerprint, *, allow_base: bool = False) -> list[Site]:
    """Proves that an adapter's factors and a model's sites map one to one, with the right shapes and the right base.

    Raises AdapterError otherwise; nothing was attached.
    """
    name = type(model).__name__
    try:
        sites = find(model, adapter.config)
    except ConfigError as error:
        raise AdapterError(f"the adapter does not fit {name}: {error}") from error
    _check_base(name, adapter, base, allow_base)
    by_path = {site.path: site for site in sites}
    homeless = [path for path in adapter.factors if path not in by_path]
    if homeless:
        raise AdapterError(
            f"{len(homeless)} of {len(adapter.factors)} factors have no site in {name}; first: {homeless[0]}"
            f"{_near(homeless[0], by_path)} Nothing was attached."
        )
    empty = [path for path in by_path if path not in adapter.factors]
    if empty:
        raise AdapterError(
            f"{len(empty)} of {len(sites)} sites of {name} have no factor in the adapter; first: {empty[0]}."
            " Nothing was attached."
        )
    for site in sites:
        _check_shapes(site, adapter, name)
    return sites


def _check_base(name: str, adapter: Adapter, base: Fingerprint, allow_base: bool) -> None:
    if adapter.base is not None and not allow_base and adapter.base.compare(base) == "different":
        raise AdapterError(
            f"the adapter was trained on another base model than this {name}: names, shapes or sampled weights differ. "
            "Nothing was attached. Load the base it was made for, or pass allow_base=True."
        )


def _check_shapes(site: Site, adapter: Adapter, name: str) -> None:
    factor = adapter.factors[site.path]
    (inputs, outputs), rank = site.sizes, site.rank
    found = (tuple(factor.A.shape), tuple(factor.B.shape))
    if found != ((rank, inputs), (outputs, rank)):
        raise AdapterError(
            f"{site.path} in {name}: found A {found[0]} and B {found[1]}, expected A {(rank, inputs)} and "
            f"B {(outputs, rank)}. Nothing was attached."
        )


def _within(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _shown(value: str | Sequence[str]) -> str:
    return repr(value) if isinstance(value, str) else repr(list(value))


def _near(name: str, paths: Iterable[str]) -> str:
    """Returns " Nearest: ..." with up to three names like `name`, by their last parts, or an empty string."""
    paths = [path for path in paths if path]
    length = name.count(".") + 1
    tails = dict.fromkeys(".".join(path.split(".")[-length:]) for path in paths)
    close = difflib.get_close_matches(name, tails, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else ""


def _ranges(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "no numbered layers"
