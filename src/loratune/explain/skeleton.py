"""A base model without its weights: built on torch's meta device from its config, in seconds whatever its size."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loratune.errors import ConfigError
from loratune.model import gguf, gguf_file, load

Notify = Callable[[str], None]

_UNREADABLE = (ValueError, KeyError, TypeError, StrictDataclassError)  # what transformers raises for a wrong config


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters have shapes and no values; `dtype` is the type that its weights are stored in."""

    name: str
    kind: str  # folder, gguf, hub cache, embedded, hub
    model: PreTrainedModel
    dtype: torch.dtype


def skeleton(name: str | Path, notify: Notify | None = None) -> Skeleton:
    """Builds a base model without weights, looking where `load_model` looks; of the hub only the config is asked for.

    The class is the one that the config names, else the causal language model of its type, else the bare model.
    Raises ConfigError where no config is found, or none that can be built.
    """
    kind, config = _config(str(name), notify)
    try:
        with torch.device("meta"):
            model = _class(config)(config)
    except (*_UNREADABLE, ArithmeticError, AttributeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"cannot build {name} from its config: {_first_line(error)}") from error
    return Skeleton(str(name), kind, model.requires_grad_(False), _dtype(config))


def _config(name: str, notify: Notify | None) -> tuple[str, PreTrainedConfig]:
    search = load._Search(name, notify)
    if (source := search.folder()) is not None:
        return source.kind, _read(source.path)
    if search.path.is_file() and search.path.suffix.lower() == ".gguf":
        file = gguf_file.read(search.path)
        return "gguf", gguf._config(file, gguf._architecture(file)[1])
    search.file()  # any other file is refused
    if search._is_hub_id() and (config := _cached(name)) is not None:
        return "hub cache", config
    search.tried.append("the hub cache does not hold its config")
    if (source := search.embedded()) is not None:
        return source.kind, _read(source.path)
    if search._is_hub_id() and not is_offline_mode():
        return "hub", _asked(name, search)
    search.tried.append("the hub was not asked (HF_HUB_OFFLINE is set)" if is_offline_mode() else "it is no hub id")
    raise search.nothing()


def _read(source: Path | str) -> PreTrainedConfig:
    try:  # code that comes with a model is never run
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, *_UNREADABLE) as error:
        raise ConfigError(f"cannot read the config of {source}: {_first_line(error)}") from error


def _cached(name: str) -> PreTrainedConfig | None:
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except OSError:  # the cache does not know it
        return None
    except _UNREADABLE as error:
        raise ConfigError(f"cannot read the config of {name}: {_first_line(error)}") from error


def _asked(name: str, search: Any) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        search.tried.append(f"the hub cannot give it: {_first_line(error)}")
        raise search.nothing() from error
    except _UNREADABLE as error:
        raise ConfigError(f"cannot read the config of {name}: {_first_line(error)}") from error


def _class(config: PreTrainedConfig) -> Callable[[PreTrainedConfig], PreTrainedModel]:
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    causal = type(config) in AutoModelForCausalLM._model_mapping  # pyright: ignore[reportOperatorIssue]
    return (AutoModelForCausalLM if causal else AutoModel).from_config


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = config.dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _first_line(error: BaseException) -> str:
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
