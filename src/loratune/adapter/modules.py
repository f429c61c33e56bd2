"""The modules of the plain model, looked at through wrappers, and which of them share a weight."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from loratune.adapter.matching import within
from loratune.adapter.wrapper import lookup, unwrapped


def logical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) as the plain model has them: wrappers are looked through, factors left out."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            for name, child in module._modules.items():
                if child is not None:
                    yield from walk(f"{path}.{name}" if path else name, child)

    return walk("", model)


def owner_of(model: nn.Module, path: str) -> nn.Module:
    """Returns the module that owns the parameter at a path, looked for through wrappers."""
    return lookup(model, path.rpartition(".")[0])


def parameter_at(model: nn.Module, path: str) -> nn.Parameter | None:
    """Returns the parameter at a path of the plain model, looked for through wrappers; None if it has none."""
    return owner_of(model, path)._parameters.get(path.rpartition(".")[2])


def put_parameter(model: nn.Module, path: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Puts a parameter at a path of the plain model and returns the one that was there."""
    before = parameter_at(model, path)
    owner_of(model, path)._parameters[path.rpartition(".")[2]] = parameter
    return before


def input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Returns the path of the embedding that the model says its inputs go through, None if it says nothing."""
    try:
        named: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers' models without tokens
        return None
    embedding = unwrapped(named) if named is not None else None
    return next((path for path, module in modules.items() if module is embedding), None)


def tied(model: nn.Module, paths: Sequence[str]) -> dict[str, list[str]]:
    """Returns, for each path whose weight other modules share, the paths of those others."""
    groups = {path: group for group in _sharing(model) for path in group if path in paths}
    return {path: [other for other in groups[path] if other != path] for path in paths if path in groups}


def _sharing(model: nn.Module) -> list[list[str]]:
    """Returns the groups of modules whose `weight` is one parameter."""
    owners: dict[int, list[str]] = {}
    for path, module in logical_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    return [group for group in owners.values() if len(group) > 1]


def ties(model: nn.Module) -> dict[str, str]:
    """Returns, for each module that shares its weight, the path of the one that leads: the input embedding, else the
    first embedding, else the first. A head that the model's configuration says is not tied is left apart."""
    modules = dict(logical_modules(model))
    apart = getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False
    front = input_embedding(model, modules)
    leads: dict[str, str] = {}
    for group in _sharing(model):
        embeddings = [path for path in group if isinstance(modules[path], nn.Embedding)]
        members = embeddings if apart and embeddings else group
        leader = front if front in members else (embeddings or members)[0]
        leads |= {path: leader for path in members if path != leader}
    return leads


def leading(chosen: list[str], shared: Mapping[str, str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Puts, in the place of targets that share a weight, the one module that leads them, in the model's order."""
    wanted = {shared.get(path, path) for path in chosen}
    return [path for path in modules if path in wanted] if shared else chosen


def with_tied(model: nn.Module, paths: list[str]) -> list[str]:
    """Adds the modules that share a weight with what is trained whole: all of them are trained as one."""
    shared = ties(model)
    members = {*shared, *shared.values()}
    groups = {shared.get(path, path) for path in members if within(path, paths)}
    wanted = {*paths, *(path for path in members if shared.get(path, path) in groups and not within(path, paths))}
    return [path for path, _ in logical_modules(model) if path in wanted]
