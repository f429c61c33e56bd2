"""Sites: which layers of a model an adapter stands at. A target that matches nothing is an error, never a silence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from loratune.adapter import roles
from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig, pattern_matches
from loratune.adapter.fingerprint import Fingerprint
from loratune.adapter.hosts import HOST_KINDS, Host, host_of, num_experts, stacked
from loratune.adapter.matching import by_pattern, in_layers, matches, named, near, shown, within, without_excluded
from loratune.adapter.modules import input_embedding, leading, logical_modules, parameter_at, ties, with_tied
from loratune.errors import AdapterError, ConfigError

# What a task's new head may be called: trained whole by PEFT's task models (peft_model.py).
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


TOKENS = "token_adapter"  # the last part of the path of a site of trained embedding rows, as in PEFT's keys


@dataclass(frozen=True)
class Site:
    """One weight that gets a factor: where it is, what kind it is, and the factor's rank and scale.

    path: the layer's, or the parameter's where the module keeps it to itself; owner: the module to be wrapped;
    parameter: its name inside the owner, None for a layer's own weight; key: what PEFT's files call the site.
    tokens: the rows of an embedding that are trained; tied_to: the site whose factor this one shares.
    """

    path: str
    module: nn.Module
    host: Host
    rank: int
    scale: float
    owner: str
    key: str
    parameter: str | None = None
    tokens: tuple[int, ...] | None = None
    tied_to: str | None = None
    turned: bool = False  # it stores the shared weight's outputs where the other layer has inputs

    @property
    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs) of the weight."""
        return self.host.sizes(self.module)

    @property
    def is_layer(self) -> bool:
        """Whether the site is a layer's own weight, not rows of an embedding or a weight inside a module."""
        return self.path == self.owner

    @property
    def weight(self) -> nn.Parameter:
        return attrgetter(self.parameter or "weight")(self.module)  # while FSDP computes, it is no Parameter

    @property
    def bias(self) -> str:
        """The path of the parameter called `bias` beside the weight, if there is one."""
        return f"{self.owner}.{self.parameter or ''}".rpartition(".")[0] + ".bias"

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1) if self.host.kind == "Conv" else 1

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B: (R, *inputs) and (O, R / groups), or (E, R, I) and (E, O, R) of stacked experts."""
        A, B = (self.rank, *self.host.inputs(self.module)), (self.host.outputs(self.module), self.rank // self.groups)
        experts = num_experts(self.weight) if self.host.kind == "Parameter" else None
        return (A, B) if experts is None else ((experts, *A), (experts, *B))


def find(model: nn.Module, config: LoraConfig) -> list[Site]:
    """Returns the sites a configuration selects, in the model's order, by PEFT's matching rules.

    Raises ConfigError if a target, an excluded name, a pattern or a layer index matches nothing (nearest names are
    given), or if a target is a kind of layer no factor can be attached to.
    """
    modules = dict(logical_modules(model))
    saved = saved_paths(model, config)
    chosen = [path for path in _targets(model, config, modules) if not within(path, saved)]
    chosen = in_layers(without_excluded(chosen, config, modules), config)
    shared = ties(model) if config.ensure_weight_tying else {}
    chosen = leading(chosen, shared, modules)
    if not chosen and config.target_modules:
        raise ConfigError(
            f"target_modules={shown(config.target_modules)} leaves no layer of {type(model).__name__} to adapt."
        )
    found = [site for path in chosen for site in _sites_of(path, modules[path], config)]
    tied_ones = _tied_sites(modules, found, shared)
    if tied_ones and (config.use_dora or config.lora_bias):
        raise ConfigError(
            f"{tied_ones[0].path} is tied to {tied_ones[0].tied_to}: one factor serves both only without use_dora and "
            "lora_bias, which hold one number for each output. Set them, or ensure_weight_tying, to False."
        )
    _check_patterns(config, [*chosen, *(site.path for site in tied_ones)], tied_ones)
    found += _parameter_sites(modules, config, type(model).__name__)
    return found + _token_sites(model, modules, config) + tied_ones


def _check_patterns(config: LoraConfig, chosen: Sequence[str], tied_ones: Sequence[Site]) -> None:
    patterns = (*config.rank_pattern, *config.alpha_pattern)
    for pattern in patterns:
        if not any(pattern_matches(pattern, path) for path in chosen):
            raise ConfigError(
                f"pattern {pattern!r} matches none of the {len(chosen)} adapted layers.{near(pattern, chosen)}"
            )
    for site in tied_ones:
        own = config.rank(site.path), config.scale(site.path)
        if own != (site.rank, site.scale) and any(pattern_matches(pattern, site.path) for pattern in patterns):
            raise ConfigError(
                f"rank_pattern or alpha_pattern gives {site.path} rank {own[0]} and scale {own[1]:g}, but "
                f"{site.tied_to}, to which it is tied, has {site.rank} and {site.scale:g}. Name {site.tied_to} alone."
            )


def _sites_of(path: str, module: nn.Module, config: LoraConfig) -> list[Site]:
    rank, scale = config.rank(path), config.scale(path)
    if isinstance(module, nn.MultiheadAttention):
        return _attention_sites(path, module, rank, scale, config)
    host = host_of(module)
    if host is None:
        raise ConfigError(
            f"target {path} is a {type(module).__name__}; a factor can be attached to {', '.join(HOST_KINDS)}. "
            "Nothing was attached."
        )
    if host.kind == "Embedding" and config.lora_bias:
        raise ConfigError(f"target {path}: lora_bias=True is not supported for Embedding. Nothing was attached.")
    if host.kind == "Conv" and rank % module.groups:  # type: ignore[operator]
        raise ConfigError(
            f"{path} has {module.groups} groups, which do not divide r={rank}. Choose another rank there."
        )
    return [Site(path, module, host, rank, scale, owner=path, key=path)]


def _attention_sites(
    path: str, module: nn.MultiheadAttention, rank: int, scale: float, config: LoraConfig
) -> list[Site]:
    """torch's attention reads its weights itself: q, k, v stacked in one, and the output projection's."""
    if not module._qkv_same_embed_dim:
        raise ConfigError(f"{path}: a MultiheadAttention whose keys or values have another size cannot be adapted.")
    if config.use_dora or config.lora_bias:
        raise ConfigError(f"{path} is a MultiheadAttention, which takes neither use_dora nor lora_bias.")
    names = {"in_proj_weight": path, "out_proj.weight": f"{path}.base_layer.out_proj"}
    return [
        Site(f"{path}.{name}", module, stacked(name, module), rank, scale, owner=path, key=key, parameter=name)
        for name, key in names.items()
    ]


def _parameter_sites(modules: dict[str, nn.Module], config: LoraConfig, where: str) -> list[Site]:
    """`target_parameters`: the whole parameter path, or its end from a dot on. PEFT's key for the site is the module's
    path, with one ".base_layer" for each further parameter of that module which is registered later."""
    parameters = {
        f"{path}.{name}" if path else name: (path, name)
        for path, module in modules.items()
        for name, _ in module.named_parameters(recurse=False)
    }
    chosen: dict[str, list[str]] = {}
    for target in config.target_parameters or ():
        hits = [path for path in parameters if matches(target, path)]
        if not hits:
            raise ConfigError(f"target_parameters: {where} has no parameter {target!r}.{near(target, parameters)}")
        for path in hits:
            owner, name = parameters[path]
            if modules[owner].get_parameter(name).ndim not in (2, 3) or not owner:
                raise ConfigError(f"target_parameters: {path} must be 2-D or 3-D and not on the root module.")
            chosen.setdefault(owner, []).append(name)
    found: list[Site] = []
    for owner, names in chosen.items():
        module = modules[owner]
        for depth, name in enumerate(reversed([n for n, _ in module.named_parameters() if n in names])):
            path, key = f"{owner}.{name}", owner + ".base_layer" * depth
            rank, scale = config.rank(path), config.scale(path)
            found.append(Site(path, module, stacked(name, module), rank, scale, owner, key, parameter=name))
    return found


def _token_sites(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> list[Site]:
    """`trainable_token_indices`: a list for the input embedding, or a mapping from module names to lists."""
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    by_name = wanted if isinstance(wanted, Mapping) else {_input_embedding(model, modules): wanted}
    found: list[Site] = []
    for name, indices in by_name.items():
        for path in named([name], modules, "trainable_token_indices", type(model).__name__):
            module: Any = modules[path]
            host = host_of(module)
            if host is None or host.kind != "Embedding":
                raise ConfigError(f"trainable_token_indices: {path} is a {type(module).__name__}, not an Embedding.")
            beyond = [index for index in indices if not 0 <= index < module.num_embeddings]
            if beyond:
                raise ConfigError(
                    f"trainable_token_indices: {path} has {module.num_embeddings} rows; found {beyond[0]}."
                )
            site = f"{path}.{TOKENS}"
            found.append(Site(site, module, host, len(indices), 1.0, owner=path, key=site, tokens=tuple(indices)))
    return found + _tied_sites(modules, found, ties(model))


def _input_embedding(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    path = input_embedding(model, modules)
    if path is None:
        raise ConfigError("trainable_token_indices: the model names no input embedding. Give {module name: indices}.")
    return path


def _tied_sites(modules: Mapping[str, nn.Module], found: Sequence[Site], shared: Mapping[str, str]) -> list[Site]:
    """Returns a site for each module that shares its weight with an adapted one: they get one factor together."""
    leaders = {site.owner: site for site in found if site.parameter is None}
    taken = {site.owner for site in found}
    pairs = [(path, leaders[leader]) for path, leader in shared.items() if leader in leaders and path not in taken]
    return [_tied_site(path, modules[path], leader) for path, leader in pairs]


def _tied_site(path: str, module: nn.Module, leader: Site) -> Site:
    host = host_of(module)
    if host is None or leader.host.kind == "Conv":
        raise ConfigError(f"{path}, a {type(module).__name__}, cannot be tied to {leader.owner}. Nothing was attached.")
    name = f"{path}.{TOKENS}" if leader.tokens else path
    return Site(
        name, module, host, leader.rank, leader.scale, owner=path, key=path,
        tied_to=leader.path, turned=host.output_dim != leader.host.output_dim,
    )  # fmt: skip


def _targets(model: nn.Module, config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    targets = config.target_modules
    if not targets:
        return []
    if isinstance(targets, tuple):
        return named(targets, modules, "target_modules", type(model).__name__)
    if targets in roles.PRESETS:
        return roles.select(model, targets)
    if targets.lower() == "all-linear":
        head = {path for path, names in roles.module_roles(model).items() if "head" in names}
        head |= set(ties(model) if config.ensure_weight_tying else ())
        return [p for p, m in modules.items() if _is_linear(m) and p not in head and not _is_classifier(p, config)]
    return by_pattern(targets, modules, "target_modules", type(model).__name__)


def _is_linear(module: nn.Module) -> bool:
    """Linear and Conv1D; not the output projection of torch's attention, which is never called."""
    host = host_of(module)
    kinds = ("Linear", "Conv1D")
    return host is not None and host.kind in kinds and type(module).__name__ != "NonDynamicallyQuantizableLinear"


def _is_classifier(path: str, config: LoraConfig) -> bool:
    """A new classification head is trained whole (modules_to_save), never by a factor (PEFT's rule)."""
    return config.task_type in ("SEQ_CLS", "TOKEN_CLS") and path.split(".")[0] in ("score", "classifier")


def saved_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Returns the modules trained and saved in full: those that `modules_to_save` names, and the head of the task.

    PEFT adds the heads' names by itself, so a file may name some that the model lacks. Raises ConfigError for no match.
    """
    modules = dict(logical_modules(model))
    heads = _TASK_HEADS.get(config.task_type or "", ())
    present = [name for name in heads if any(matches(name, path) for path in modules)]
    wished = config.modules_to_save or ()
    names = [*(name for name in wished if name not in heads or not present), *present]
    paths = named(names, modules, "modules_to_save", type(model).__name__) if names else []
    return with_tied(model, paths) if config.ensure_weight_tying else paths


def bias_paths(model: nn.Module, config: LoraConfig, sites: Sequence[Site]) -> list[str]:
    """Returns the parameter paths that `bias` trains: all biases, or those of the adapted layers.

    Raises ConfigError if there is none: the wish could not be met.
    """
    if config.bias == "none":
        return []
    saved = saved_paths(model, config)
    if config.bias == "all":
        wanted = [f"{path}.bias".lstrip(".") for path, _ in logical_modules(model)]
    else:
        wanted = list(dict.fromkeys(site.bias for site in sites))
    found = [path for path in wanted if parameter_at(model, path) is not None and not within(path, saved)]
    if not found:
        raise ConfigError(f'bias={config.bias!r}, but {type(model).__name__} has no such bias. Use bias="none".')
    return found


def find_for(model: nn.Module, adapter: Adapter) -> list[Site]:
    """Returns the sites of an existing adapter's configuration; raises AdapterError if the model has no such sites."""
    try:
        found = find(model, adapter.config)
        bias_paths(model, adapter.config, found)
        return found
    except ConfigError as error:
        raise AdapterError(f"the adapter does not fit {type(model).__name__}: {error}") from error


def match(name: str, sites: Sequence[Site], adapter: Adapter, base: Fingerprint, *, allow_base: bool = False) -> None:
    """Proves that an adapter's factors and a model's sites map one to one, with the right shapes and the right base.

    Raises AdapterError otherwise; nothing was attached. `name` is the model's, for the message.
    """
    _check_base(name, adapter, base, allow_base)
    by_path = {site.path: site for site in sites}
    homeless = [path for path in adapter.factors if path not in by_path]
    if homeless:
        raise AdapterError(
            f"{len(homeless)} of {len(adapter.factors)} factors have no site in {name}; first: {homeless[0]}."
            f"{near(homeless[0], by_path)} Nothing was attached."
        )
    empty = [path for path in by_path if path not in adapter.factors]
    if empty:
        raise AdapterError(
            f"{len(empty)} of {len(by_path)} sites of {name} have no factor in the adapter; first: {empty[0]}."
            " Nothing was attached."
        )
    for site in sites:
        if site.tied_to is None and site.tokens is None:
            _check_shapes(site, adapter, name)


def _check_base(name: str, adapter: Adapter, base: Fingerprint, allow_base: bool) -> None:
    if adapter.base is not None and not allow_base and adapter.base.compare(base) == "different":
        raise AdapterError(
            f"the adapter was trained on another base model than this {name}: names, shapes or sampled weights differ. "
            "Nothing was attached. Load the base it was made for, or pass allow_base=True."
        )


def _check_shapes(site: Site, adapter: Adapter, name: str) -> None:
    factor = adapter.factors[site.path]
    found, expected = (tuple(factor.A.shape), tuple(factor.B.shape)), site.shapes()
    if found != expected:
        raise AdapterError(
            f"{site.path} in {name}: found A {found[0]} and B {found[1]}, expected A {expected[0]} and "
            f"B {expected[1]}. Nothing was attached."
        )
    for what, wanted in (("magnitude", adapter.config.use_dora), ("bias", adapter.config.lora_bias)):
        vector: Tensor | None = getattr(factor, what)
        if (vector is not None) != wanted or (vector is not None and vector.numel() != expected[1][-2]):
            raise AdapterError(f"{site.path} in {name}: its {what} is missing, unexpected or of the wrong size.")
