"""PEFT's configuration classes: the same fields, defaults and checks, and mutable as PEFT's are.

What they mean is decided by `loratune.adapter.config.LoraConfig`, which `LoraConfig.checked` makes; a method that is
not implemented is refused there, at injection.
"""

import json
import os
import warnings
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from loratune import files
from loratune.adapter import roles
from loratune.adapter.config import LoraConfig as CheckedConfig
from loratune.adapter.matching import matches
from loratune.adapter.sites import logical_modules
from loratune.errors import ConfigError

CONFIG_NAME = "adapter_config.json"
__version__ = "0.21.2"  # the version of PEFT whose names, defaults and files these are

# model_type -> default targets. Empty: the roles of the "fast" preset are used; an entry here wins.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: dict[str, Any] = {}
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class PeftType(str, Enum):  # noqa: UP042  # PEFT's is a str whose str() is "PeftType.LORA"
    """The method; LoRA is the only one."""

    LORA = "LORA"


class TaskType(str, Enum):  # noqa: UP042
    """The task, hence the head that is trained and saved in full."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def locate(path: str | os.PathLike[str], name: str, **hub: Any) -> Path | None:
    """Returns the local path of one file of an adapter: in a folder, else downloaded from the hub; None if absent."""
    folder = Path(path, hub.get("subfolder") or "")
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(path), name, **hub))
    except EntryNotFoundError:
        return None


@dataclass
class PeftConfig:
    """The fields every method has. `from_pretrained` returns the class that the file names."""

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self.peft_version = self.peft_version or __version__
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ConfigError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(TaskType)}."
            )

    @property
    def is_prompt_learning(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that are saved."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "runtime_config"}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Writes adapter_config.json into a directory, which is made if need be."""
        values = {name: plain(value) for name, value in self.to_dict().items()}
        files.write_json(Path(save_directory) / CONFIG_NAME, values)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        """Returns the content of an adapter_config.json, without what is valid at run time only."""
        values = json.loads(Path(path_json_file).read_text("utf-8"))
        values.pop("runtime_config", None)
        return values

    @classmethod
    def from_peft_type(cls, **values: Any) -> "PeftConfig":
        """Returns a configuration of the class that `peft_type` names; unknown fields are dropped with a warning."""
        kind = LoraConfig if values.get("peft_type") == PeftType.LORA else cls
        known = {item.name for item in fields(kind)}
        unknown = sorted(set(values) - known)
        if unknown and "peft_type" not in values:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {kind.__name__}, these are ignored. The file was "
                "probably written by a newer PEFT; what these fields change is not applied.",
                stacklevel=3,
            )
        return kind(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any) -> Any:
        """Reads the configuration of an adapter in a folder or on the hub; raises ValueError where there is none."""
        path = locate(pretrained_model_name_or_path, CONFIG_NAME, **hub)
        if path is None:
            raise ConfigError(f"Can't find '{CONFIG_NAME}' at '{pretrained_model_name_or_path}'")
        return cls.from_peft_type(**cls.from_json_file(path))


@dataclass
class LoraRuntimeConfig:
    """Options of PEFT's that are never saved; accepted, and without effect here."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """PEFT's LoraConfig: its fields and defaults (r 8, lora_alpha 8, lora_dropout 0). Mutable until it is used."""

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    monteclora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check()

    def _check(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={self.init_lora_weights} instead."
            )
        if self.lora_bias and self.use_dora:
            raise ConfigError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")

    def checked(self, model: nn.Module) -> CheckedConfig:
        """Returns loratune's configuration for a model, heads and default targets filled in; raises ConfigError."""
        self._fill(model)
        values = {**self.to_dict(), "target_modules": plain(self.target_modules) or ()}
        for name in ("rank_pattern", "alpha_pattern"):
            values[name] = values[name] or {}
        if isinstance(self.init_lora_weights, str):
            values["init_lora_weights"] = self.init_lora_weights.lower()
        values |= {"task_type": plain(self.task_type), "peft_type": "LORA"}
        if self.target_parameters and not self.target_modules and not _any_parameter(model, self.target_parameters):
            raise ConfigError(
                "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
                "arguments."
            )
        return CheckedConfig.from_peft(values, "LoraConfig")

    def _fill(self, model: nn.Module) -> None:
        """Sets what PEFT sets on the configuration it is given: the task's head, and targets that were left out."""
        paths = [path for path, _ in logical_modules(model)]
        heads = [name for name in _HEADS.get(self.task_type or "", ()) if any(matches(name, path) for path in paths)]
        if heads:
            self.modules_to_save = list(dict.fromkeys([*(self.modules_to_save or ()), *heads]))
        if self.target_modules is None and not self.target_parameters:
            found = default_targets(model)
            self.target_modules = set(found) if isinstance(found, list) else found


def _any_parameter(model: nn.Module, names: list[str]) -> bool:
    paths = [f"{path}.{name}" for path, module in logical_modules(model) for name in module._parameters]
    return any(matches(name, path) for name in names for path in paths)


def default_targets(model: nn.Module) -> list[str] | str:
    """Returns the targets of a transformers model whose configuration names none: its query and value projections."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, dict) else {}
    kind = values.get("model_type")
    if kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind]
    chosen = _by_roles(model) if kind else []
    if not chosen:
        raise ConfigError(f"Please specify `target_modules` in `peft_config`; {type(model).__name__} has no default.")
    return chosen


def _by_roles(model: nn.Module) -> list[str]:
    try:
        paths = roles.select(model, "fast")
    except ConfigError:  # a model whose layers have no known roles; the caller says what to do
        return []
    return sorted(roles.minimal_targets(paths, dict(logical_modules(model))))


def plain(value: Any) -> Any:
    """Returns a value as JSON holds it: sets sorted, names of an enumeration as strings."""
    return sorted(value) if isinstance(value, set) else value.value if isinstance(value, Enum) else value


def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """Returns a configuration from its fields."""
    return PeftConfig.from_peft_type(**config_dict)
