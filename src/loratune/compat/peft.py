"""PEFT's names over loratune's values: `from loratune.compat.peft import LoraConfig, get_peft_model`.

A layer's tensors, state dict keys and files are PEFT's; the mathematics is `loratune.adapter`'s. What differs on
purpose is listed in docs/peft-compatibility.md.
"""

from importlib import import_module
from typing import Any

from torch import nn

from loratune.compat.peft_attach import Layers, PeftWarning
from loratune.compat.peft_config import (
    LoraConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftType,
    TaskType,
    get_peft_config,
)
from loratune.compat.peft_hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from loratune.compat.peft_layers import BaseTunerLayer, LoraLayer
from loratune.compat.peft_model import (
    HUB,
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    name_base,
)
from loratune.compat.peft_report import (
    get_layer_status,
    get_model_status,
)
from loratune.compat.peft_state import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from loratune.compat.peft_tuner import LoraModel
from loratune.compat.peft_wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from loratune.errors import ConfigError

__all__ = [
    "AutoPeftModelForCausalLM", "AuxiliaryTrainingWrapper", "BaseTunerLayer", "LoraConfig", "LoraLayer", "LoraModel",
    "LoraRuntimeConfig", "ModulesToSaveWrapper", "PeftConfig", "PeftModel", "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType", "PeftWarning", "TaskType",
    "TrainableTokensWrapper", "get_base_model_state_dict", "get_layer_status", "get_model_status", "get_peft_config",
    "get_peft_model", "get_peft_model_state_dict", "hotswap_adapter", "inject_adapter_in_model", "load_peft_weights",
    "prepare_model_for_compiled_hotswap",
    "set_base_model_state_dict", "set_peft_model_state_dict",
]  # fmt: skip


class AutoPeftModelForCausalLM:
    """An adapter together with the base model its configuration names."""

    @classmethod
    def from_pretrained(
        cls, path: str, adapter_name: str = "default", is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Loads the base with transformers, then the adapter onto it. Raises ConfigError if the file names no base."""
        config = PeftConfig.from_pretrained(path, **{name: kwargs.pop(name) for name in HUB if name in kwargs})
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"{path}: base_model_name_or_path is empty. Load the base, then PeftModel.from_pretrained."
            )
        loader = import_module("transformers").AutoModelForCausalLM
        base = loader.from_pretrained(config.base_model_name_or_path, revision=config.revision, **kwargs)
        return PeftModel.from_pretrained(base, path, adapter_name, is_trainable, config)


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Wraps a model's layers in place and returns the PeftModel around it; with `mixed` too, LoRA being all there is.

    Raises ConfigError or AdapterError with the model untouched.
    """
    name_base(peft_config, model)
    peft_config.revision = revision or peft_config.revision
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type or "", PeftModel)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: LoraConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False, **_: Any
) -> nn.Module:
    """Wraps a model's layers in place and returns the model itself; keys have no "base_model.model." in front."""
    layers = Layers.on(model)
    layers.add(adapter_name, peft_config, on_meta=low_cpu_mem_usage)
    model.__dict__["peft_config"] = layers.peft_config
    return model
