"""The rules by which names and patterns select layers: PEFT's, but a name that selects nothing is an error."""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from loratune.adapter.config import LoraConfig
from loratune.errors import ConfigError

_LAYER_INDEX = re.compile(r"\.(\d+)\.")


def matches(name: str, path: str) -> bool:
    """PEFT's rule for a list: the whole path, or its end from a dot on."""
    return path == name or path.endswith("." + name)


def named(names: Sequence[str], modules: Iterable[str], what: str, where: str) -> list[str]:
    paths = [path for path in modules if path]
    chosen: set[str] = set()
    for name in names:
        hits = [path for path in paths if matches(name, path)]
        if not hits:
            raise ConfigError(
                f"{what}: no layer of {where} is named {name!r}.{near(name, paths)} Nothing was attached."
            )
        chosen.update(hits)
    return [path for path in paths if path in chosen]


def by_pattern(pattern: str, modules: Iterable[str], what: str, where: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{what}={pattern!r} is not a regular expression: {error}.") from error
    chosen = [path for path in modules if path and expression.fullmatch(path)]
    if not chosen:
        raise ConfigError(
            f"{what}={pattern!r} is a regular expression for whole paths and matches none of {where}'s layers."
            f"{near(pattern, modules)} For names, give a list: [{pattern!r}]."
        )
    return chosen


def without_excluded(chosen: list[str], config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    excluded = config.exclude_modules
    if not excluded:
        return chosen
    find_excluded = by_pattern if isinstance(excluded, str) else named
    gone = set(find_excluded(excluded, modules, "exclude_modules", "the model"))  # type: ignore[arg-type]
    if not gone & set(chosen):
        raise ConfigError(f"exclude_modules={shown(excluded)} excludes none of the {len(chosen)} targeted layers.")
    return [path for path in chosen if path not in gone]


def in_layers(chosen: list[str], config: LoraConfig) -> list[str]:
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


def within(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def shown(value: str | Sequence[str]) -> str:
    return repr(value) if isinstance(value, str) else repr(list(value))


def near(name: str, paths: Iterable[str]) -> str:
    """Returns " Nearest: ..." with up to three names like `name`, by their last parts, or an empty string."""
    paths = [path for path in paths if path]
    length = name.count(".") + 1
    tails = dict.fromkeys(".".join(path.split(".")[-length:]) for path in paths)
    close = difflib.get_close_matches(name, tails, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else ""


def _ranges(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "no numbered layers"
