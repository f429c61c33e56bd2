"""What LoRA means on one model, in figures: its layers by role, what a configuration costs, which preset reaches where.

Only shapes are read, so a model on the meta device serves.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from loratune.adapter import roles, sites
from loratune.adapter.config import LoraConfig
from loratune.adapter.hosts import host_of
from loratune.adapter.modules import parameter_at, tied
from loratune.adapter.roles import PRESET_SETTINGS, ROLES, RoleCoverage
from loratune.errors import ConfigError
from loratune.explain.texts import PRESET_NAMES

FLOAT32_BYTES = 4  # of a factor's number, as trained and as saved
MOMENT_BYTES = 8  # AdamW keeps two float32 numbers of each trained one
_TASK_HEADS = ("classifier", "score", "qa_outputs")


@dataclass(frozen=True)
class Role:
    """One role on a model: its layers' names (-> the roles each serves), (outputs, inputs, count), and all weights."""

    role: str
    names: dict[str, tuple[str, ...]]
    shapes: list[tuple[int, int, int]]
    num_layers: int
    num_weights: int


@dataclass(frozen=True)
class Cost:
    """What a configuration costs. Shares are of 1; `extra_flops` is the work added to a token's training step.

    extra_flops = (6 R + 2 S) / 4 P: R numbers of the factors, forward and both gradients; S of modules trained whole,
    the weight's gradient; P the frozen linear weights a token passes, forward and input gradient. Attention's own
    products, norms and the loss are left out of both sides.
    """

    setting: str
    scale: float
    num_parameters: int
    share: float
    adapter_bytes: int
    optimizer_bytes: int
    extra_flops: float
    merged_bytes: int


@dataclass(frozen=True)
class NoCost:
    """A setting that this model cannot have, and why."""

    setting: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The map role x layer: for each role and each numbered layer the first preset that reaches it, None for no layer.

    `outside` holds the roles whose layers stand outside the numbered ones, as a head does.
    """

    layers: list[str]
    reached: dict[str, list[str | None]]
    outside: dict[str, str]


@dataclass(frozen=True)
class Model:
    """A model's facts; `frozen_weights` is P."""

    module: nn.Module
    dtype: torch.dtype
    num_parameters: int
    frozen_weights: int
    paths: dict[str, tuple[str, ...]]  # of each linear layer -> its roles

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize


def of(module: nn.Module, dtype: torch.dtype) -> Model:
    """Returns the facts of a plain model whose weights are stored as `dtype`."""
    paths = roles.module_roles(module)
    linear = sum(_weight(module, path).numel() for path in paths)
    total = sum(parameter.numel() for parameter in module.parameters())
    return Model(module, dtype, total, linear + _active_experts(module), paths)


def _weight(module: nn.Module, path: str) -> nn.Parameter:
    weight = parameter_at(module, f"{path}.weight")
    assert weight is not None
    return weight


def _active_experts(module: nn.Module) -> int:
    """The stacked expert weights that one token passes: as many experts as the config sends it to."""
    config: Any = getattr(module, "config", None)
    wanted = getattr(config, "num_experts_per_tok", None)
    owners = [module.get_submodule(path) for path in roles.coverage(module, ()).stacked]
    weights = [weight for owner in owners for weight in owner.parameters(recurse=False) if weight.dim() == 3]
    return sum(weight.numel() if wanted is None else weight[0].numel() * wanted for weight in weights)


# ---- layers ---------------------------------------------------------------------------------------------------------


def by_role(model: Model) -> list[Role]:
    """Returns each of the eight roles as this model has it; one without layers where the model lacks the role."""
    covered = roles.coverage(model.module, ())
    return [_role(model, covered.roles[role]) for role in ROLES]


def _role(model: Model, row: RoleCoverage) -> Role:
    paths = [path for path, own in model.paths.items() if row.role in own]
    sizes = Counter(_sizes(model.module.get_submodule(path)) for path in paths)
    shapes = [(outputs, inputs, count) for (inputs, outputs), count in sizes.items()]
    return Role(row.role, row.names, shapes, len(row.layers), sum(o * i * n for o, i, n in shapes))


def _sizes(module: nn.Module) -> tuple[int, int]:
    host = host_of(module)
    assert host is not None
    return host.sizes(module)


def coverage(model: Model) -> Coverage:
    """Returns which preset reaches which layer first; a fused layer is taken whole."""
    maps = {
        preset: roles.coverage(model.module, roles.select(model.module, preset))
        for preset in PRESET_NAMES
        if not isinstance(cost_of_preset(model, preset), NoCost)
    }
    widest = maps.get("deep") or roles.coverage(model.module, ())
    layers = list(widest.layers)

    def first(role: str, layer: str) -> str | None:
        return next((name for name, each in maps.items() if each.roles[role].layers.get(layer, (0, 0))[0]), None)

    outside = {role: first(role, "") for role in ROLES}
    return Coverage(
        layers,
        {role: [first(role, layer) for layer in layers] for role in ROLES},
        {role: preset for role, preset in outside.items() if preset},
    )


def has_stacked_experts(model: Model) -> bool:
    """Whether the model has expert weights that no preset reaches."""
    return bool(roles.coverage(model.module, ()).stacked)


# ---- costs ----------------------------------------------------------------------------------------------------------


def cost(model: Model, config: LoraConfig, setting: str) -> Cost | NoCost:
    """Returns what a configuration costs on this model, or why the model cannot have it."""
    try:
        found = sites.find(model.module, config)
        biases = sites.bias_paths(model.module, config, found)
        saved = sites.saved_paths(model.module, config)
    except ConfigError as error:
        return NoCost(setting, str(error))
    factors = sum(math.prod(shape) for site in found if site.tied_to is None for shape in site.shapes())
    whole = sum(p.numel() for path in saved for p in model.module.get_submodule(path).parameters())
    trained = factors + whole + sum(_numel(model, path) for path in biases)
    return Cost(
        setting=setting,
        scale=config.scale(""),
        num_parameters=trained,
        share=trained / (model.num_parameters + trained),
        adapter_bytes=FLOAT32_BYTES * trained,
        optimizer_bytes=MOMENT_BYTES * trained,
        extra_flops=(6 * factors + 2 * whole) / (4 * model.frozen_weights),
        merged_bytes=model.num_bytes + _untied(model, [*(site.owner for site in found), *saved]) * model.dtype.itemsize,
    )


def _numel(model: Model, path: str) -> int:
    parameter = parameter_at(model.module, path)
    return 0 if parameter is None else parameter.numel()


def _untied(model: Model, owners: Sequence[str]) -> int:
    """The weights that a merged model holds in addition: a change of one that several modules share unties them all."""
    groups = {frozenset((path, *others)) for path, others in tied(model.module, owners).items()}
    return sum((len(group) - 1) * _weight(model.module, next(iter(group))).numel() for group in groups)


def cost_of_preset(model: Model, preset: str, factor: int = 1) -> Cost | NoCost:
    """Returns the cost of a preset with `factor` times its rank; lora_alpha grows with it, so the scale stays."""
    r = int(PRESET_SETTINGS[preset]["r"]) * factor
    return cost(model, LoraConfig.preset(preset, r=r), preset if factor == 1 else f"{preset}, r = {r}")


def presets(model: Model) -> list[Cost | NoCost]:
    """Returns the cost of each preset with its own settings."""
    return [cost_of_preset(model, preset) for preset in PRESET_NAMES]


def doubled(model: Model, topic: str) -> list[Cost | NoCost]:
    """Returns the costs on this model of a topic's usual steps, each one up or twice the one before it."""
    if topic in PRESET_NAMES:
        return [cost_of_preset(model, topic, factor) for factor in (1, 2, 4)]
    return [cost(model, LoraConfig(**setting), _words(setting)) for setting in _steps(model, topic)]


def _steps(model: Model, topic: str) -> list[dict[str, Any]]:
    if topic in ROLES:
        paths = [path for path, own in model.paths.items() if topic in own]
        names = roles.minimal_targets(paths, (path for path, _ in model.module.named_modules()))
        return [{"target_modules": tuple(names), **rank} for rank in _RANKS] if paths else []
    if topic == "modules_to_save":
        heads = [path for path, own in model.paths.items() if "head" in own or path in _TASK_HEADS]
        return [{topic: None}, *({topic: (path,)} for path in heads)]
    return _STEPS[topic]


def _words(setting: dict[str, Any]) -> str:
    """A setting on one short line; what is a name in itself needs no other before it."""
    plain = ("target_modules", "modules_to_save")
    return ", ".join(_value(v) if name in plain else f"{name} = {_value(v)}" for name, v in setting.items())


def _value(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else "none" if value is None else str(value)


_RANKS: list[dict[str, Any]] = [{"r": 8}, {"r": 16}, {"r": 32}]
_ALPHAS: list[dict[str, Any]] = [{"lora_alpha": 8}, {"lora_alpha": 16}, {"lora_alpha": 32}]
# The steps that are shown for each topic, on the preset `fast` where nothing else is said.
_STEPS: dict[str, list[dict[str, Any]]] = {
    "r": _RANKS,
    "A": _RANKS,
    "B": _RANKS,
    "lora_alpha": _ALPHAS,
    "scale": _ALPHAS,
    "target_modules": [{"target_modules": name} for name in PRESET_NAMES],
    "lora_dropout": [{"lora_dropout": 0.05}, {"lora_dropout": 0.1}],
    "bias": [{"bias": "none"}, {"bias": "lora_only"}, {"bias": "all"}],
    "task_type": [{"task_type": "CAUSAL_LM"}],
    "merge": [{"target_modules": name, "r": PRESET_SETTINGS[name]["r"]} for name in PRESET_NAMES],
}


# ---- as plain values ------------------------------------------------------------------------------------------------


def report(model: Model, topic: str | None) -> dict[str, Any]:
    """Returns the facts that are shown, as plain values: everything without a topic, else the topic's steps."""
    facts: dict[str, Any] = {
        "class": type(model.module).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters,
        "num_bytes": model.num_bytes,
        "frozen_linear_weights": model.frozen_weights,
    }
    if topic is not None:
        return facts | {"steps": [asdict(step) for step in doubled(model, topic)]}
    return facts | {
        "roles": [asdict(role) for role in by_role(model)],
        "coverage": asdict(coverage(model)),
        "presets": [asdict(each) for each in presets(model)],
    }
