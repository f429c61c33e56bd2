"""LoraConfig: what to adapt and how. Field names are PEFT's, because saved configurations must be interchangeable."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Self

from loratune.adapter.roles import PRESET_SETTINGS, PRESETS
from loratune.errors import ConfigError

TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEGMENTATION")
_OWN_TASKS = ("SEGMENTATION",)  # that PEFT does not know
BIASES = ("none", "all", "lora_only")
ABOUT = "loratune.json"  # beside a run's adapter: what PEFT's two files have no place for
INIT_NAMES = ("gaussian", "orthogonal", "pissa", "olora")

# PEFT's defaults where ours differ: a file that lacks the field means PEFT's value.
_PEFT_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None}

# Fields PEFT writes for methods we do not implement, with the value that means "not used".
_PEFT_UNUSED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# Fields that change nothing by themselves: bookkeeping of PEFT, or parameters of an unused method.
_PEFT_IGNORED = {"auto_mapping", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type", "peft_version"} | {
    "qalora_group_size",
    "runtime_config",
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of one LoRA adapter, checked when they are made; raises ConfigError.

    scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732).
    `lora_alpha` left out means 2 r. `target_modules` is a list of names or dotted suffixes, a regular expression that
    matches the whole path, "all-linear", or the name of a preset (which sets the targets only; `LoraConfig.preset`
    sets r, lora_alpha and lora_dropout too). Hu et al. 2021, arXiv 2106.09685; fields as in PEFT's LoraConfig:
    `use_dora` trains magnitudes too (arXiv 2402.09353), `lora_bias` a bias of B, `target_parameters` names parameters
    of a module (stacked experts), `trainable_token_indices` rows of the embedding, `ensure_weight_tying` trains
    modules that share a weight as one.
    """

    r: int = 8
    lora_alpha: float = field(default=None)  # type: ignore[assignment]  # None means 2 r, see __post_init__
    target_modules: str | tuple[str, ...] = "fast"
    exclude_modules: str | tuple[str, ...] | None = None
    lora_dropout: float = 0.05
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    task_type: str | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    target_parameters: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.lora_alpha is None:  # pyright: ignore[reportUnnecessaryComparison]
            object.__setattr__(self, "lora_alpha", 2 * self.r)
        for name in _LISTS:
            object.__setattr__(self, name, _frozen_names(name, getattr(self, name)))
        object.__setattr__(self, "trainable_token_indices", _frozen_tokens(self.trainable_token_indices))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _frozen_pattern(name, getattr(self, name)))
        _check(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Returns the settings of a preset ("fast", "quality", "deep"), targets included; `overrides` win."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}.")
        settings: dict[str, Any] = {**PRESET_SETTINGS[name], "target_modules": name, **overrides}
        if "r" in overrides and "lora_alpha" not in overrides:
            del settings["lora_alpha"]
        return cls(**settings)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles by value: a read-only mapping can do neither."""
        return _made, (type(self), {item.name: _plain(getattr(self, item.name)) for item in fields(self)})

    def with_(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed, checked again."""
        return replace(self, **changes)

    def rank(self, path: str) -> int:
        """Returns r at a module path: the first entry of `rank_pattern` that matches it, else r."""
        return int(_pattern_value(self.rank_pattern, path, self.r))

    def scale(self, path: str) -> float:
        """Returns the factor s in W + s B A at a module path."""
        rank, alpha = self.rank(path), _pattern_value(self.alpha_pattern, path, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], where: str) -> Self:
        """Reads the content of an adapter_config.json, with PEFT's defaults for fields it lacks.

        Raises ConfigError for a method that is not implemented here and for unknown fields: never ignored.
        """
        if values.get("peft_type", "LORA") != "LORA":
            raise ConfigError(f"{where}: peft_type is {values['peft_type']!r}; only LORA adapters can be read.")
        known = {item.name for item in fields(cls)}
        for name, value in values.items():
            if name in _PEFT_UNUSED and value not in _PEFT_UNUSED[name]:
                raise ConfigError(f"{where}: {name} = {value!r} is not supported; the adapter was not read.")
            if name not in known and name not in _PEFT_UNUSED and name not in _PEFT_IGNORED:
                raise ConfigError(f"{where}: unknown field {name!r} (value {value!r}); the adapter was not read.")
        chosen = {**_PEFT_DEFAULTS, **{name: value for name, value in values.items() if name in known}}
        if chosen["target_modules"] is None:
            raise ConfigError(f"{where}: target_modules is missing; a saved adapter must name its targets.")
        return cls(**chosen)

    def to_peft(self, target_modules: list[str], fan_in_fan_out: bool) -> dict[str, Any]:
        """Returns the content of an adapter_config.json; `target_modules` is the expanded list of what was adapted."""
        written = {item.name: _plain(getattr(self, item.name)) for item in fields(self)}
        unused = {name: neutral[-1] if name == "loftq_config" else neutral[0] for name, neutral in _PEFT_UNUSED.items()}
        return {
            **unused,
            **written,
            "auto_mapping": None,
            "fan_in_fan_out": fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": True,  # the file holds trained values; how they began does not matter any more
            "megatron_core": "megatron.core",
            "peft_type": "LORA",
            "qalora_group_size": 16,
            "target_modules": sorted(target_modules),
            "task_type": None if self.task_type in _OWN_TASKS else self.task_type,
        }


_LISTS = [
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
    *("layers_pattern", "layers_to_transform"),
]


def _frozen_tokens(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({str(name): _indices(indices) for name, indices in value.items()})
    return None if value is None else _indices(value)


def _indices(value: Any) -> tuple[int, ...]:
    if isinstance(value, list | tuple) and all(type(each) is int for each in value):
        return tuple(value)
    raise ConfigError(f"trainable_token_indices is {value!r}; expected a list of token ids, or module -> such a list.")


def _frozen_names(name: str, value: Any) -> Any:
    kind = int if name == "layers_to_transform" else str
    if value is None or (isinstance(value, str) and name in ("target_modules", "exclude_modules")):
        return value
    if type(value) is kind:
        return (value,)
    if isinstance(value, list | tuple | set | frozenset) and all(type(each) is kind for each in value):
        return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
    expected = "a whole number or a list of them" if kind is int else "a string or a list of strings"
    raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}.")


def _frozen_pattern(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} is {value!r}; expected a mapping from patterns to numbers.")
    return MappingProxyType(dict(value))


def _made(cls: type[LoraConfig], values: dict[str, Any]) -> LoraConfig:
    return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _pattern_value(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the path, as a regular expression, from a dot on."""
    for key, value in pattern.items():
        if pattern_matches(key, path):
            return value
    return default


def pattern_matches(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(config: LoraConfig) -> None:
    def refuse(name: str, expected: str, hint: str = "") -> None:
        raise ConfigError(f"{name} is {getattr(config, name)!r}; expected {expected}.{' ' + hint if hint else ''}")

    if not isinstance(config.r, int) or isinstance(config.r, bool) or config.r <= 0:
        refuse("r", "a whole number above 0", "Usual ranks are 8, 16 and 32.")
    if not _number(config.lora_alpha) or config.lora_alpha <= 0:
        refuse("lora_alpha", "a number above 0", "At 0 the adapter would do nothing; usual values are r or 2 r.")
    if not _number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        refuse("lora_dropout", "a number from 0 up to, not including, 1", "Usual values are 0, 0.05 and 0.1.")
    if config.bias not in BIASES:
        refuse("bias", 'one of "none", "all", "lora_only"')
    if config.task_type is not None and config.task_type not in TASK_TYPES:
        refuse("task_type", f"one of {', '.join(TASK_TYPES)}")
    if config.init_lora_weights == "eva":
        raise ConfigError("EVA begins from data: loratune.attach(model, loratune.eva(model, config, batches)).")
    if not _known_init(config.init_lora_weights):
        refuse("init_lora_weights", "True, False, " + ", ".join(repr(n) for n in INIT_NAMES) + ' or "pissa_niter_N"')
    if not (
        config.target_modules or config.modules_to_save or config.target_parameters or config.trainable_token_indices
    ):
        refuse("target_modules", "at least one name, a preset or a regular expression")
    for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(getattr(config, name), bool):
            refuse(name, "True or False")
    _check_together(config)
    _check_patterns(config)


def _known_init(name: Any) -> bool:
    return isinstance(name, bool) or name in INIT_NAMES or re.fullmatch(r"pissa_niter_\d+", str(name)) is not None


def _check_together(config: LoraConfig) -> None:
    """Refuses fields that exclude each other, each for the reason given."""
    if config.lora_bias and (config.use_dora or not isinstance(config.init_lora_weights, bool)):
        raise ConfigError("lora_bias works with plain LoRA and init_lora_weights True or False only.")
    if config.target_parameters and (config.lora_dropout or config.use_dora or config.lora_bias):
        raise ConfigError(
            "target_parameters changes weights, not outputs, so it takes no lora_dropout (set it to 0), use_dora or "
            "lora_bias."
        )


def _check_patterns(config: LoraConfig) -> None:
    if (
        isinstance(config.target_modules, str)
        and config.target_modules
        and (config.layers_to_transform or config.layers_pattern)
    ):
        raise ConfigError(
            f"layers_to_transform and layers_pattern need target_modules as a list; found {config.target_modules!r}."
        )
    if config.layers_pattern and not config.layers_to_transform:
        raise ConfigError("layers_pattern is set but layers_to_transform is not; give the layers to adapt.")
    for name, rank in config.rank_pattern.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
            raise ConfigError(f"rank_pattern[{name!r}] is {rank!r}; expected a whole number above 0.")
    for name, alpha in config.alpha_pattern.items():
        if not _number(alpha) or alpha <= 0:
            raise ConfigError(f"alpha_pattern[{name!r}] is {alpha!r}; expected a number above 0.")
    for name in (*config.rank_pattern, *config.alpha_pattern, *(config.layers_pattern or ())):
        try:
            re.compile(name)
        except re.error as error:
            raise ConfigError(f"pattern {name!r} is not a regular expression: {error}.") from error
