"""PeftModel: what a user of PEFT holds. Its layers and tensors are those of `base_model.model`, wrapped in place."""

import inspect
import os
import tempfile
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loratune.compat.peft_attach import Layers
from loratune.compat.peft_config import (
    LoraConfig,
    PeftConfig,
)
from loratune.compat.peft_layers import KnownToPeft
from loratune.compat.peft_report import (
    TunerLayerStatus,
    TunerModelStatus,
    count,
    get_layer_status,
    get_model_status,
    write_card,
)
from loratune.compat.peft_state import (
    LoadResult,
    load_peft_weights,
    set_peft_model_state_dict,
    write_adapter,
)
from loratune.compat.peft_tuner import LoraModel
from loratune.errors import AdapterError, ConfigError

HUB = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")


class _Forward:
    """`forward` with the signature of the base model's, which is how trainers learn what a model takes."""

    def __init__(self, model: "PeftModel") -> None:
        self.model = model
        self.__signature__ = inspect.signature(model.get_base_model().forward)

    def __call__(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        with self.model.rows(adapter_names, args, kwargs):
            return self.model.base_model(*args, **kwargs)


def _unbound(model: "PeftModel", *args: Any, labels: Any = None, **kwargs: Any) -> Any:
    """What `PeftModel.forward` is; it names `labels` because trainers look there for a model's labels."""
    return _Forward(model)(*args, **kwargs, **({} if labels is None else {"labels": labels}))


class _ForwardOf:
    """Binds `_Forward`; not a data descriptor, since trainers set `forward` on the instance."""

    def __get__(self, model: "PeftModel | None", kind: type) -> Any:
        return _unbound if model is None else _Forward(model)


class PeftModel(KnownToPeft, nn.Module):
    """A model with LoRA adapters, by PEFT's names: `base_model.model` is the base, its layers wrapped in place."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.base_model = LoraModel(model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
        self.peft_type = peft_config.peft_type
        if getattr(model, "is_gradient_checkpointing", False):
            self.prepare_model_for_gradient_checkpointing(model)

    forward: Any = _ForwardOf()  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def layers_(self) -> Layers:
        return self.base_model.layers_

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        return self.layers_.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> Any:
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self.active_adapters) and not all(layer.disable_adapters for layer in self.layers_.all())

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Makes a frozen embedding's output require gradients, without which a checkpointed block has none to pass."""
        model.enable_input_require_grads()
        return model

    # ---- running --------------------------------------------------------------------------------------------------

    @contextmanager
    def rows(self, names: Sequence[str] | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Generator[None]:
        """Within the block row i of the batch goes through the adapter names[i]; "__base__" is the base model."""
        layers = self.layers_
        if names is None or all(layer.disable_adapters for layer in layers.all()):
            yield
            return
        self._check_rows(names, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
        device = next(self.parameters()).device
        layers.shared.num_rows = len(names)
        layers.shared.rows = {
            name: torch.tensor([i for i, each in enumerate(names) if each == name], device=device)
            for name in dict.fromkeys(names)
            if name != "__base__"
        }
        try:
            yield
        finally:
            layers.shared.rows, layers.shared.num_rows = None, 0

    def _check_rows(self, names: Sequence[str], inputs: Sequence[Tensor]) -> None:
        unknown = sorted(set(names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise AdapterError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if self.training:
            raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
        if any(layer.merged for layer in self.layers_.all()):
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if inputs and len(inputs[0]) != len(names):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(inputs[0])} respectively."
            )

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Generates with the active adapters, or with the row's own; each beam of a row takes the row's."""
        if adapter_names is None:
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]
        beams = kwargs.get("num_beams") or 1
        with self.rows([name for name in adapter_names for _ in range(beams)], (), {}):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Within the block the model is the base model."""
        disabled = {layer.disable_adapters for layer in self.layers_.all()}
        if len(disabled) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. All of them "
                "will be enabled after the block.",
                stacklevel=3,
            )
        self.layers_.enable(False)
        try:
            yield
        finally:
            if disabled != {True}:
                self.layers_.enable(True)

    # ---- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a new adapter, which is not active. Raises ConfigError or AdapterError with the model untouched."""
        name_base(peft_config, self.get_base_model())
        self.layers_.add(adapter_name, peft_config, autocast=autocast_adapter_dtype, on_meta=low_cpu_mem_usage)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Makes one adapter the active one; it alone trains."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.layers_.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        self.layers_.delete(adapter_name)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ignore_mismatched_sizes: bool = False,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Reads an adapter and adds it, or into the one of that name; returns the keys that did not match."""
        hub = {name: value for name, value in kwargs.items() if name in HUB}
        tensors = load_peft_weights(model_id, **hub)
        if adapter_name not in self.peft_config:
            config = peft_config or PeftConfig.from_pretrained(model_id, **hub)
            config.inference_mode = not is_trainable
            self.layers_.add(adapter_name, config, autocast=autocast_adapter_dtype)
        result = set_peft_model_state_dict(self, tensors, adapter_name, ignore_mismatched_sizes)
        if not is_trainable:
            self.eval()
        return result

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> "PeftModel":
        """Reads an adapter in a folder or on the hub onto a model; trainable only if told. Warns of missing keys."""
        hub = {name: value for name, value in kwargs.items() if name in HUB}
        config = config or PeftConfig.from_pretrained(model_id, **hub)
        assert config is not None
        config.inference_mode = not is_trainable
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", cls)
        found = kind(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        try:
            result = found.load_adapter(
                model_id, adapter_name, is_trainable, None, autocast_adapter_dtype,
                kwargs.get("ignore_mismatched_sizes", False), **hub,
            )  # fmt: skip
        except Exception:
            found.unload()  # the model as it was
            raise
        if result.missing_keys:
            warnings.warn(
                f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}.", stacklevel=2
            )
        return found

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **_: Any,
    ) -> None:
        """Writes the adapters, not the base: "default" into the directory, others into one of their own inside it.

        `path_initial_model_for_weight_conversion` is not needed: what PiSSA and OLoRA learn is always stored as plain
        LoRA for the original base. Raises ConfigError for `safe_serialization=False`, which asks for a pickle.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False asks for a pickle; only safetensors is written: leave it out.")
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise AdapterError(f"no adapter {unknown[0]!r} to save; there are {', '.join(self.peft_config)}.")
        if is_main_process:
            write_card(self, folder)
            for name in names:
                where = folder if name == "default" else folder / name
                write_adapter(self, name, where, save_embedding_layers)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Saves the adapters and uploads them to a repository on the hub."""
        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.get("token"))
        api.create_repo(repo_id, exist_ok=True, private=kwargs.get("private"))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder)

    # ---- what there is ----------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns (trainable parameters, all parameters, the adapters' included)."""
        return count(self)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, of how many."""
        trained, total = count(self)
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)


class PeftModelForSequenceClassification(PeftModel):
    """PeftModel whose head (`classifier`, `score`) is trained and saved in full."""


class PeftModelForTokenClassification(PeftModel):
    """PeftModel whose head (`classifier`, `score`) is trained and saved in full."""


class PeftModelForQuestionAnswering(PeftModel):
    """PeftModel whose head (`qa_outputs`) is trained and saved in full."""


class PeftModelForCausalLM(PeftModel):
    """PeftModel of a causal language model."""


class PeftModelForSeq2SeqLM(PeftModel):
    """PeftModel of an encoder and decoder."""


class PeftModelForFeatureExtraction(PeftModel):
    """PeftModel of an encoder."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def name_base(config: LoraConfig, model: nn.Module) -> None:
    before, now = config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    config.base_model_name_or_path = now
    if before is not None and before != now:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{now}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=3,
        )
