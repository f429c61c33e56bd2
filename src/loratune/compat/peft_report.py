"""What is told of a model with PEFT's layers: the state of its layers, and the card of a saved adapter."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loratune import files
from loratune.compat.peft_config import plain
from loratune.compat.peft_layers import BaseTunerLayer
from loratune.compat.peft_wrappers import TrainableTokensWrapper
from loratune.errors import AdapterError


def count(model: nn.Module) -> tuple[int, int]:
    """Returns (trainable parameters, all parameters)."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@dataclass
class TunerLayerStatus:
    """The state of one layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Any]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass
class TunerModelStatus:
    """The state of all layers; "irregular" where they differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Any
    active_adapters: Any
    merged_adapters: Any
    requires_grad: dict[str, Any]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Returns the state of every layer of PEFT's in a model; raises AdapterError if there is none."""
    root: Any = getattr(model, "base_model", model)
    found = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensWrapper)
    ]
    if not found:
        raise AdapterError("No adapter layers found in the model. Make them with get_peft_model.")
    return [_layer_status(name, module) for name, module in found]


def _layer_status(path: str, layer: Any) -> TunerLayerStatus:
    trained = {name: list(layer.trained(name)) for name in layer.adapter_names()}
    return TunerLayerStatus(
        name=path,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={name: _common([p.requires_grad for p in held]) for name, held in trained.items()},
        available_adapters=sorted(trained),
        devices={name: sorted({p.device.type for p in held}) for name, held in trained.items()},
    )


def _common(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Returns the state of all layers together."""
    layers = get_layer_status(model)
    trained, total = count(model)
    grads, devices, merged = defaultdict[str, list[Any]](list), defaultdict[str, set[str]](set), []
    for status in layers:
        for name in status.available_adapters:
            grads[name].append(status.requires_grad[name])
            devices[name] |= set(status.devices[name])
    for name in grads:  # an adapter is merged if it is in every layer that has it
        states = {name in status.merged_adapters for status in layers if name in status.available_adapters}
        merged.append((name, states))
    wrapped = hasattr(model, "get_base_model")
    return TunerModelStatus(
        base_model_type=type(model.get_base_model() if wrapped else model).__name__,  # type: ignore[union-attr]
        adapter_model_type="LoraModel" if wrapped else "None",
        peft_types=dict.fromkeys(model.peft_config, "LORA") if wrapped else {},  # type: ignore[union-attr]
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common([status.enabled for status in layers]),
        active_adapters=_common([status.active_adapters for status in layers]),
        merged_adapters="irregular"
        if any(len(states) > 1 for _, states in merged)
        else [name for name, states in merged if states == {True}],
        requires_grad={name: _common(values) for name, values in grads.items()},
        available_adapters=sorted(grads),
        devices={name: sorted(values) for name, values in devices.items()},
    )


def write_card(model: Any, folder: Path) -> None:
    """Writes README.md; of one that exists the text and other metadata stay."""
    import yaml

    path = folder / "README.md"
    values, text = {}, ""
    if path.is_file():
        parts = path.read_text("utf-8").split("---\n", 2)
        values, text = (yaml.safe_load(parts[1]) or {}, parts[2]) if len(parts) == 3 else ({}, "---\n".join(parts))
    config: Any = getattr(model.get_base_model(), "config", None)
    values |= {"library_name": "peft", "tags": sorted({*(values.get("tags") or ()), "lora", "loratune"})}
    if hasattr(config, "to_dict") and "_name_or_path" in config.to_dict():
        values["base_model"] = config.to_dict()["_name_or_path"]
    text = text or _card_text(model)
    files.atomic_write(path, f"---\n{yaml.safe_dump(values, sort_keys=True)}---\n{text}")


def _card_text(model: Any) -> str:
    rows = [
        f"| {name} | {config.r} | {config.lora_alpha:g} | {config.lora_dropout:g} | {config.bias} | "
        f"{plain(config.target_modules) or 'none'} |"
        for name, config in model.peft_config.items()
    ]
    trained, total = count(model)
    base = next(iter(model.peft_config.values())).base_model_name_or_path or type(model.get_base_model()).__name__
    return _CARD.format(base=base, rows="\n".join(rows), trained=trained, total=total)


_CARD = """
# LoRA adapter for {base}

A low-rank adapter (Hu et al. 2021, arXiv 2106.09685): beside each adapted layer y = W x it adds s B A x, with the base
weight W unchanged. The base model is not in this folder.

| adapter | r | lora_alpha | lora_dropout | bias | adapted layers |
|---|---|---|---|---|---|
{rows}

{trained:,} of {total:,} parameters were trainable when this was saved.

## Use

With loratune:

```python
import loratune

model, tokenizer = loratune.load_model("{base}")
attached = loratune.load_adapter(model, "path/to/this/folder")
```

With PEFT, or with loratune under PEFT's names (`from loratune.compat.peft import PeftModel`):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
model = model.merge_and_unload()  # optional: plain layers with the update in their weights
```

## Files

- `adapter_config.json`: the settings above, in PEFT's format.
- `adapter_model.safetensors`: the tensors A and B of each adapted layer.

## What to add here

What the adapter was trained on, for what it is meant, how it was evaluated, and under which licence it may be used.
"""
