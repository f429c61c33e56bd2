"""PEFT's adapter format, both ways: adapter_config.json and adapter_model.safetensors.

Keys: "base_model.model.<path>.lora_A.weight" (R, I) and ".lora_B.weight" (O, R); on embeddings ".lora_embedding_A"
(R, I) and ".lora_embedding_B" (O, R); a trained bias "<path>.base_layer.bias" on an adapted layer, "<path>.bias"
elsewhere; a module of `modules_to_save` under its plain name. The base's fingerprint is in the safetensors metadata,
where PEFT does not look.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from loratune import files
from loratune.adapter import sites
from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank, TokenRows
from loratune.adapter.fingerprint import Fingerprint
from loratune.adapter.inits import is_subtracted
from loratune.adapter.modules import logical_modules
from loratune.adapter.roles import minimal_targets
from loratune.errors import AdapterError, ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")
_PARTS = {
    **dict.fromkeys(_A, "A"),
    **dict.fromkeys(_B, "B"),
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_METADATA = "loratune"
_MAX_CONFIG_BYTES = 4 << 20
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def write(adapter: Adapter, model: nn.Module, path: Path, *, replace: bool = False) -> None:
    """Writes the adapter as a directory that appears whole or not at all; raises ConfigError if it exists already."""
    config, tensors = encode(adapter, model)
    with files.staged_directory(path, replace=replace) as staging:
        write_into(staging, config, tensors, adapter.base)


def write_into(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], base: Fingerprint | None) -> None:
    """Writes the two files into a directory of the caller's."""
    metadata = {"format": "pt"}
    if base is not None:
        metadata[_METADATA] = json.dumps({"base": base.to_json()}, sort_keys=True)
    files.write_json(folder / CONFIG, config)
    files.atomic_write(folder / WEIGHTS, _sorted_header(save(tensors, metadata)))


def _sorted_header(data: bytes) -> bytes:
    """The same file with its header's keys in order: safetensors writes metadata in an order that changes by process,
    and two saves of one adapter should be the same bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def encode(adapter: Adapter, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the content of the two files: the configuration with expanded targets, and the tensors by PEFT's keys."""
    found = sites.find(model, adapter.config)
    tensors: dict[str, Tensor] = {}
    for site in found:
        tensors.update({_PREFIX + key: value for key, value in _encoded(site, adapter.factors[site.path]).items()})
    keys = {site.bias: f"{site.key}.base_layer.bias" for site in found}
    for path, bias in adapter.biases.items():
        tensors[_PREFIX + keys.get(path, path)] = bias
    for path, module in adapter.saved.items():
        tensors.update({f"{_PREFIX}{path}.{name}": value for name, value in module.state_dict().items()})
    stored = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    return encode_config(adapter, model), stored


def encode_config(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    """Returns the content of adapter_config.json, with expanded targets. Modules that are tied are all named: PEFT ties
    an embedding of another name than embed_tokens only where the head is named too."""
    found = sites.find(model, adapter.config)
    layers = [site for site in found if site.key == site.owner and not site.path.endswith(sites.TOKENS)]
    config = _alike(plain_lora(_named_base(adapter.config, model)), [site for site in layers if site.tied_to])
    if config.ensure_weight_tying and adapter.saved:
        config = config.with_(modules_to_save=tuple(adapter.saved))
    chosen = {site.owner for site in layers if not _is_stacked(site, adapter.config)}
    return config.to_peft(minimal_targets(chosen, dict(logical_modules(model))), _fan_in_fan_out(found))


def _alike(config: LoraConfig, tied: list[sites.Site]) -> LoraConfig:
    """PEFT looks up a tied layer's rank and alpha by its own name: patterns make them those of the layer it follows."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for site in tied:
        rank, scale = config.rank(site.tied_to or ""), config.scale(site.tied_to or "")
        if (config.rank(site.path), config.scale(site.path)) != (rank, scale):
            key = re.escape(site.path)
            ranks[key], alphas[key] = rank, scale * (math.sqrt(rank) if config.use_rslora else rank)
    return config.with_(rank_pattern={**ranks, **config.rank_pattern}, alpha_pattern={**alphas, **config.alpha_pattern})


def _is_stacked(site: sites.Site, config: LoraConfig) -> bool:
    return site.parameter is not None and any(sites.matches(name, site.path) for name in config.target_parameters or ())


def _encoded(site: sites.Site, factor: LowRank) -> dict[str, Tensor]:
    """Returns one factor's tensors as PEFT stores them, under PEFT's keys."""
    if site.tied_to is not None and site.path.endswith(sites.TOKENS):
        return {}
    if isinstance(factor, TokenRows):
        rows = site.weight.detach()[factor.indices].to(factor.B.dtype) + factor.B.T  # type: ignore[index]
        return {f"{site.key}.trainable_tokens_delta": rows}
    A, B = factor.pair(factor.A.dtype)
    if B.ndim == 3:
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    elif site.host.kind == "Conv":
        A, B = _for_all_inputs(A, site.groups), B[(...,) + (None,) * (A.ndim - 2)]
    embedding = site.host.kind == "Embedding"
    tensors = {site.key + _A[embedding]: A, site.key + _B[embedding]: B}
    if factor.bias is not None:
        tensors[f"{site.key}.lora_B.bias"] = factor.bias
    if factor.magnitude is not None:
        shape = (1, -1, *(1,) * (A.ndim - 2)) if site.host.kind == "Conv" else (-1,)
        tensors[f"{site.key}.lora_magnitude_vector"] = factor.magnitude.view(shape)
    return tensors


def _for_all_inputs(A: Tensor, groups: int) -> Tensor:
    """PEFT's A of a grouped convolution sees all inputs: its own group's, and zeros for the others."""
    if groups == 1:
        return A
    blocks = A.unflatten(0, (groups, -1))  # (g, R/g, I/g, ...)
    wide = torch.zeros(groups, blocks.shape[1], groups, *blocks.shape[2:], dtype=A.dtype, device=A.device)
    for group in range(groups):
        wide[group, :, group] = blocks[group]
    return wide.flatten(2, 3).flatten(0, 1)


def plain_lora(config: LoraConfig) -> LoraConfig:
    """An update s (B A - B0 A0) is stored as plain LoRA of rank 2 r and the same scale."""
    if not is_subtracted(config.init_lora_weights):
        return config
    growth = math.sqrt(2) if config.use_rslora else 2
    return config.with_(
        r=2 * config.r,
        lora_alpha=config.lora_alpha * growth,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: alpha * growth for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def _named_base(config: LoraConfig, model: nn.Module) -> LoraConfig:
    name = getattr(model, "name_or_path", None) or None
    return config.with_(
        base_model_name_or_path=name or config.base_model_name_or_path, exclude_modules=None,
        layers_to_transform=None, layers_pattern=None,
    )  # fmt: skip


def _fan_in_fan_out(found: list[sites.Site]) -> bool:
    return bool(found) and all(site.host.fan_in_fan_out for site in found)


def read(path: Path) -> Adapter:
    """Reads an adapter directory into a value, strictly; raises AdapterError and touches no model.

    Refused: pickles (.bin), damaged or oversized headers, tensors that are not finite floats, a half without its other
    half, ranks other than the configuration's, fields of methods that are not implemented.
    """
    return decode(_read_config(path), *_read_tensors(path), path)


def decode(config: LoraConfig, tensors: dict[str, Tensor], base: Fingerprint | None, path: Path) -> Adapter:
    """Returns the adapter that tensors under PEFT's keys are; `path` is named in errors. Raises AdapterError."""
    parts: dict[str, dict[str, Tensor]] = {}
    loose: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        owner, part = _split(key)
        if part is None:
            loose[owner] = tensor
        else:
            parts.setdefault(owner, {})[part] = tensor
    factors = {owner: _factor(owner, found, config, path) for owner, found in parts.items()}
    if not factors and not loose:
        raise AdapterError(f"{path / WEIGHTS} holds no tensors; this is not an adapter.")
    return Adapter(config, factors, loose=loose, base=base)


def _split(key: str) -> tuple[str, str | None]:
    """Returns (site's key, "A" | "B" | "bias" | "magnitude") of a factor's tensor, (parameter path, None) of others."""
    path = key.removeprefix(_PREFIX)
    for suffix, part in _PARTS.items():
        if path.endswith(suffix):
            return path.removesuffix(suffix), part
    return path.replace(".base_layer.", "."), None


def _factor(owner: str, parts: dict[str, Tensor], config: LoraConfig, path: Path) -> LowRank:
    if not {"A", "B"} <= set(parts):
        raise AdapterError(f"{path}: {owner} has lora_{next(iter(parts))} but not its other half.")
    A, B, rank = parts["A"], parts["B"], config.rank(owner)
    B = B.flatten(1) if A.ndim > 2 else B  # a convolution's B has a kernel of size 1
    stacked = bool(config.target_parameters)  # (experts * r, ...): checked against the model's number of experts
    if A.ndim < 2 or B.ndim != 2 or (not stacked and (A.shape[0] != rank or rank % B.shape[1])):
        raise AdapterError(
            f"{path}: {owner} has A {tuple(A.shape)} and B {tuple(B.shape)}, but {CONFIG} gives rank {rank} there."
        )
    dtype = torch.promote_types(A.dtype, torch.float32)
    bias, magnitude = (parts[name].flatten().to(dtype) if name in parts else None for name in ("bias", "magnitude"))
    dropout, groups = config.lora_dropout, 1 if stacked else rank // B.shape[1]
    return LowRank(
        A.to(dtype), B.to(dtype), config.scale(owner), dropout, bias=bias, magnitude=magnitude, groups=groups
    )


def _read_config(path: Path) -> LoraConfig:
    file = path / CONFIG
    if not file.is_file():
        raise AdapterError(f"{path} is not an adapter: {CONFIG} is missing.")
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{file} has {file.stat().st_size:,} bytes; an adapter's configuration is far smaller.")
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise AdapterError(f"{file} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{file}: expected an object, found {type(values).__name__}.")
    try:
        return LoraConfig.from_peft(values, str(file))
    except ConfigError as error:
        message = str(error)
        raise AdapterError(message if str(file) in message else f"{file}: {message}") from error


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], Fingerprint | None]:
    file = path / WEIGHTS
    if not file.is_file():
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).exists()]
        hint = (
            f"{pickles[0]} is a pickle, which can run code and is not read; load it once in PEFT and save it with "
            "safe_serialization=True"
            if pickles
            else f"{WEIGHTS} is missing"
        )
        raise AdapterError(f"{path}: {hint}.")
    tensors, metadata = load_tensors(file)
    for name, tensor in tensors.items():
        check_tensor(name, tensor, file)
    return tensors, _read_fingerprint(metadata, file)


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file into memory: (tensors, metadata). Raises AdapterError for one that is damaged."""
    try:
        with safe_open(str(file), "pt") as opened:
            # Copies: a mapped file that changes under a running process changes or kills it.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged or not a safetensors file: {error}.") from error


def check_tensor(name: str, tensor: Tensor, file: Path) -> None:
    """Raises AdapterError unless a file's tensor holds finite floating point numbers."""
    counts = tensor.dtype == torch.int64 and _split(name)[1] is None  # a saved module's: batches a norm has seen
    if tensor.dtype not in _FLOATS and not counts:
        raise AdapterError(f"{file}: {name} has type {tensor.dtype}; expected floating point numbers.")
    if not math.isfinite(float(tensor.detach().double().sum())):
        raise AdapterError(f"{file}: {name} holds values that are not finite (NaN or infinity).")


def _read_fingerprint(metadata: dict[str, str], file: Path) -> Fingerprint | None:
    if _METADATA not in metadata:
        return None
    try:
        return Fingerprint.from_json(json.loads(metadata[_METADATA])["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{file}: the base's fingerprint in its metadata cannot be read: {error}.") from error
