"""PEFT's state dicts and files over loratune's one format: `loratune.adapter.peft_format`."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save
from torch import Tensor, nn

from loratune import files
from loratune.adapter import making, sites
from loratune.adapter.adapter import Adapter
from loratune.adapter.attach import Attachments
from loratune.adapter.inits import is_subtracted
from loratune.adapter.peft_format import decode, encode, encode_config, plain_lora
from loratune.adapter.wrapper import unwrapped
from loratune.compat.peft_attach import Layers
from loratune.compat.peft_config import CONFIG_NAME, LoraConfig, locate, plain
from loratune.errors import AdapterError

WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME = "adapter_model.bin", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head")  # names whose presence in target_modules makes PEFT save the layer itself
_LAYER_PARTS = re.compile(r"\.(base_layer|original_module)(?=\.)")


class SizeMismatchError(AdapterError, RuntimeError):
    """Tensors of a file that have other shapes than the model's; nothing was loaded."""


class LoadResult(NamedTuple):
    """The keys an adapter has that were not given, and the given ones that have no place."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def layers_of(model: nn.Module) -> Layers:
    """Returns the layers of a PeftModel or of a model with injected adapters, looked for through FSDP and compile."""
    for inner in (model, *model.modules()):
        found = Attachments.of(inner)
        if isinstance(found, Layers):
            return found
    raise AdapterError(f"{type(model).__name__} has no adapters of PEFT's layout. Make one with get_peft_model.")


def _prefix(model: nn.Module) -> str:
    return _PREFIX if any(type(module).__name__ == "LoraModel" for module in model.modules()) else ""


# ---- state dicts ----------------------------------------------------------------------------------------------------


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Any = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Returns an adapter's tensors under the keys of its file, as copies on the CPU.

    `save_embedding_layers` "auto" adds the embedding and the head where target_modules names them, or where the
    vocabulary was resized. `state_dict`, PEFT's way to hand over gathered shards, must be None.
    """
    if state_dict is not None and any(getattr(p, "placements", None) for p in model.parameters()):
        raise AdapterError("state_dict of a sharded model cannot be taken apart here; gather the parameters first.")
    layers = layers_of(model)
    tensors = encode(layers.adapters[adapter_name], layers.model)[1]
    if _wants_embeddings(layers, layers.peft_config[adapter_name], save_embedding_layers):
        tensors.update(_embeddings(layers.model))
    prefix = _prefix(model)
    return {prefix + key.removeprefix(_PREFIX): value for key, value in tensors.items()}


def _wants_embeddings(layers: Layers, config: LoraConfig, wish: bool | str) -> bool:
    if wish is not True and (wish != "auto" or config.trainable_token_indices):
        return False
    if not hasattr(layers.model, "get_input_embeddings"):
        if wish is True:
            warnings.warn(
                "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=4
            )
        return False
    if wish is True or _resized(layers.model, config):
        return True
    targets = config.target_modules or ()
    paths = [path for path, _ in sites.logical_modules(layers.model) if path.rpartition(".")[2] in _EMBEDDINGS]
    chosen = any(re.fullmatch(targets, path) for path in paths) if isinstance(targets, str) else False
    if chosen or any(name in targets for name in _EMBEDDINGS if not isinstance(targets, str)):
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=4
        )
        return True
    return False


def _resized(model: Any, config: LoraConfig) -> bool:
    """Whether the vocabulary differs from that of the base in a local folder; a base elsewhere is not asked for."""
    path = Path(str(config.base_model_name_or_path), "config.json")
    if not (config.base_model_name_or_path and path.is_file()):
        return False
    before = LoraConfig.from_json_file(path).get("vocab_size")
    return before is not None and before != getattr(getattr(model, "config", None), "vocab_size", before)


def _embeddings(model: Any) -> dict[str, Tensor]:
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    wanted = [unwrapped(module) for module in found if module is not None]
    tensors: dict[str, Tensor] = {}
    for path, module in sites.logical_modules(model):
        if any(module is each for each in wanted):
            layer = ".base_layer" if model.get_submodule(path) is not module else ""
            for name, value in module.named_parameters(recurse=False):
                tensors[f"{_PREFIX}{path}{layer}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
    return tensors


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    **_: Any,
) -> LoadResult:
    """Gives an adapter the tensors of a state dict; embeddings that the file brings go into the base, as in PEFT.

    Raises SizeMismatchError, with nothing loaded, unless `ignore_mismatched_sizes`.
    """
    layers = layers_of(model)
    layers.materialize(adapter_name)
    adapter = layers.adapters[adapter_name]
    current = encode(adapter, layers.model)[1]
    given = {normal_key(key): value for key, value in peft_model_state_dict.items()}
    base = {_PREFIX + path: value for path, value in base_tensors(layers).items()}
    places = {**{key: base[_LAYER_PARTS.sub("", key)] for key in given if _LAYER_PARTS.sub("", key) in base}, **current}
    wrong = [key for key, value in given.items() if key in places and places[key].shape != value.shape]
    if wrong and not ignore_mismatched_sizes:
        raise SizeMismatchError(_mismatch(wrong, given, places, adapter_name))
    usable = {key: value.detach().cpu() for key, value in given.items() if key in places and key not in wrong}
    _load(layers, adapter, {**current, **{key: value for key, value in usable.items() if key in current}})
    for key in usable.keys() - current.keys():
        places[key].data.copy_(usable[key])
    return LoadResult(sorted(current.keys() - given.keys()), sorted(given.keys() - places.keys()))


def normal_key(key: str) -> str:
    key = key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key
    return _PREFIX + key.replace("_orig_mod.", "").removeprefix(_PREFIX)


def _mismatch(wrong: list[str], given: dict[str, Tensor], places: Mapping[str, Tensor], name: str) -> str:
    lines = [
        f"size mismatch for {key}: copying a param with shape {given[key].shape} from checkpoint, the shape in current "
        f"model is {places[key].shape}."
        for key in wrong
    ]
    return f"adapter {name}: " + "\n\t".join(lines)


def _load(layers: Layers, adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    found = sites.find(layers.model, adapter.config)
    read = making.fitted_to(decode(plain_lora(adapter.config), tensors, None, Path("state dict")), found)
    for path, factor in adapter.factors.items():
        if hasattr(factor, "take"):
            factor.take(read.factors[path])  # type: ignore[operator]
    for path, bias in adapter.biases.items():
        bias.data.copy_(read.loose[path])
    for path, module in adapter.saved.items():
        for name, value in module.state_dict().items():
            value.copy_(read.loose[f"{path}.{name}"])


def base_tensors(layers: Layers) -> dict[str, Tensor]:
    """Returns the tensors of the base model's own state dict, live, trained biases and modules left out."""
    tensors: dict[str, Tensor] = {}
    for path, module in sites.logical_modules(layers.model):
        held = {**module._parameters, **module._buffers}
        for name, value in held.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                full = f"{path}.{name}" if path else name
                tensors[full] = layers.originals.get(full, value)
    return tensors


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of the base model under its own keys."""
    return {name: value.detach() for name, value in base_tensors(layers_of(model)).items()}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Loads a state dict of the base model, under its own keys, into the base inside the adapters."""
    tensors = base_tensors(layers_of(model))
    result = LoadResult(sorted(tensors.keys() - state_dict.keys()), sorted(state_dict.keys() - tensors.keys()))
    if strict and any(result):
        raise SizeMismatchError(f"the keys differ: missing {result.missing_keys}, unexpected {result.unexpected_keys}.")
    for name in tensors.keys() & state_dict.keys():
        tensors[name].data.copy_(state_dict[name])
    return result


# ---- files ----------------------------------------------------------------------------------------------------------


def load_peft_weights(model_id: str | os.PathLike[str], device: str | None = None, **hub: Any) -> dict[str, Tensor]:
    """Reads the tensors of an adapter in a folder or on the hub; AdapterError for a pickle, which could run code."""
    path = locate(model_id, SAFETENSORS_WEIGHTS_NAME, **hub)
    if path is not None:
        return load_file(path, device or "cpu")
    if locate(model_id, WEIGHTS_NAME, **hub) is None:
        raise AdapterError(f"{model_id} holds no {SAFETENSORS_WEIGHTS_NAME}.")
    raise AdapterError(
        f"{model_id} holds its tensors as {WEIGHTS_NAME}, a pickle, which can run code and is not read. Load it "
        "once in PEFT and save it with safe_serialization=True."
    )


def write_adapter(model: nn.Module, name: str, folder: Path, embeddings: bool | str) -> None:
    """Writes adapter_config.json and the tensors; each file whole or not at all."""
    layers = layers_of(model)
    config = layers.peft_config[name]
    tensors = get_peft_model_state_dict(model, None, name, save_embedding_layers=embeddings)
    files.make_directory(folder)
    files.atomic_write(folder / SAFETENSORS_WEIGHTS_NAME, save(tensors, {"format": "pt"}))
    files.write_json(folder / CONFIG_NAME, _saved_config(layers, config, name))


def _saved_config(layers: Layers, config: LoraConfig, name: str) -> dict[str, Any]:
    values = {key: plain(value) for key, value in config.to_dict().items()}
    own = getattr(layers.model, "name_or_path", None) or None
    values["base_model_name_or_path"] = config.base_model_name_or_path or own
    values["inference_mode"] = True
    if is_subtracted(config.init_lora_weights):  # stored as plain LoRA of rank 2 r: the base was not changed
        values["init_lora_weights"] = True
    stated = encode_config(
        layers.adapters[name], layers.model
    )  # ranks that hot-swapping changed, modules that are tied
    names = ("target_modules", "modules_to_save") if config.ensure_weight_tying else ()
    values |= {key: stated[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", *names)}
    if config.task_type is None:
        kind = type(layers.model)
        values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return values
