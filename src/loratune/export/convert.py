"""Adapters from one format into another: PEFT's and mlx-lm's, other precisions, lower ranks, older layouts.

mlx-lm: adapters.safetensors with "<path>.lora_a" (I, R) and "<path>.lora_b" (R, O), the transposes of PEFT's A and B,
and adapter_config.json with one rank and one scale for all sites (mlx_lm/tuner/utils.py, lora.py).
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratune import files
from loratune.adapter import peft_format, stored
from loratune.adapter.adapter import Adapter
from loratune.adapter.arithmetic import compress
from loratune.adapter.config import LoraConfig
from loratune.errors import AdapterError, ConfigError
from loratune.export import companions

FORMATS = ("peft", "mlx")
SOURCES = ("peft", "peft-0.18", "mlx")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MLX_WEIGHTS = "adapters.safetensors"
_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens",)
# mlx-lm names these as transformers does; it renames others (GPT-2's transformer.h is its model.h).
_MLX_PATH = re.compile(r"(?:language_model\.)?(?:model\.layers\.\d+\.(?P<key>[\w.]+)|model\.embed_tokens|lm_head)")


@dataclass(frozen=True)
class Stored:
    """An adapter as PEFT's files hold it: the content of its configuration, tensors by key, and the value they make."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    adapter: Adapter


def convert(
    source: Path, target: Path, to: str, *, dtype: str | None = None, rank: int | None = None, layout: str | None = None
) -> dict[str, Any]:
    """Writes the adapter at `source` in a format of FORMATS to a new directory; returns what was done, for people.

    dtype: a name of DTYPES; None keeps the stored type. rank: the best approximation of that rank, with one scale and
    no patterns. layout: what the source is, of SOURCES; None lets the files tell. Raises ConfigError or AdapterError,
    before anything is written, for whatever the target cannot hold.
    """
    for name, value, known in (("--to", to, FORMATS), ("--dtype", dtype, DTYPES), ("--from", layout, SOURCES)):
        if value is not None and value not in known:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
    found, origin = read(source, layout)
    kept: dict[str, float] = {}
    if rank is not None:
        found, kept = _compressed(found, rank, source)
    config, tensors = {"peft": _as_peft, "mlx": _as_mlx}[to](found, source)
    cast = {key: _cast(key, tensor, dtype) for key, tensor in tensors.items()}
    with files.staged_directory(target) as staging:
        _write(staging, to, config, cast, found.adapter)
        companions._copy(staging, companions._terms_in(source))
        if to == "peft":
            companions._copy(staging, (source / name for name in companions._TOKENIZER))
    return _report(target, origin, to, tensors, cast, kept)


def _report(
    target: Path,
    origin: str,
    to: str,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    kept: dict[str, float],
) -> dict[str, Any]:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in after.values()})
    report: dict[str, Any] = {"path": str(target), "from": origin, "to": to, "num_tensors": len(after), "dtype": dtypes}
    report["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in after.values())
    if any(after[key].dtype != before[key].dtype for key in after):
        report["largest_rounding"] = max(_relative_change(before[key], after[key]) for key in after)
    if kept:
        path = min(kept, key=kept.__getitem__)
        shares = {"least": kept[path], "at": path, "median": statistics.median(kept.values())}
        report["energy_kept"] = shares
    return report


def _relative_change(before: Tensor, after: Tensor) -> float:
    norm = float(before.double().norm())
    return float((after.double() - before.double()).norm()) / norm if norm else 0.0


def _cast(key: str, tensor: Tensor, dtype: str | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(DTYPES[dtype]).contiguous()
    if not bool(cast.isfinite().all()):
        raise ConfigError(f"{key} reaches {float(tensor.abs().max()):.3g}, too large for {dtype}. Use bfloat16.")
    return cast


# --- Reading ----------------------------------------------------------------------------------------------------------


def read(folder: Path, layout: str | None = None) -> tuple[Stored, str]:
    """Reads an adapter of any format in SOURCES, strictly; returns it and the format found. Raises AdapterError."""
    is_mlx = (folder / MLX_WEIGHTS).is_file() and not (folder / peft_format.WEIGHTS).is_file()
    if (layout == "mlx") != is_mlx and layout is not None:
        raise ConfigError(f"--from is {layout!r}, but {folder} holds {MLX_WEIGHTS if is_mlx else peft_format.WEIGHTS}.")
    return (_read_mlx(folder), "mlx") if is_mlx else _read_peft(folder, layout)


def _read_peft(folder: Path, layout: str | None) -> tuple[Stored, str]:
    adapter = peft_format.read(folder)
    config = json.loads((folder / peft_format.CONFIG).read_bytes())
    tensors = load_file(str(folder / peft_format.WEIGHTS))
    found = Stored(config, tensors, adapter)
    experts = [path for path, each in adapter.factors.items() if stored.is_stacked(adapter.config, path, each)]
    if not experts:
        if layout == "peft-0.18":
            raise ConfigError(f"{folder} has no stacked experts; only their layout changed. Leave --from out.")
        return found, "peft"
    known = stored.expert_layout(adapter)
    if known is not None and layout not in (None, known):
        raise ConfigError(f"--from is {layout!r}, but the shapes at {experts[0]} are those of {known}.")
    chosen = known or layout
    if chosen is None:
        raise ConfigError(
            f"{folder}: the shapes at {experts[0]} do not tell which layout of stacked experts this is. "
            "Give --from peft (0.19 and later) or --from peft-0.18."
        )
    return (_to_current(found, experts, folder) if chosen == "peft-0.18" else found), chosen


def _to_current(found: Stored, experts: list[str], folder: Path) -> Stored:
    config, tensors = found.adapter.config, dict(found.tensors)
    if config.rank_pattern:
        raise AdapterError(f"{folder}: rank_pattern with stacked experts leaves their ranks open; nothing was written.")
    for path in experts:
        A, B = (f"{_PREFIX}{path}.lora_{half}.weight" for half in "AB")
        tensors[A], tensors[B] = stored.to_current_layout(tensors[A], tensors[B], config.r)
    return _stored(found.config, tensors, found.adapter, folder)


def _stored(config: dict[str, Any], tensors: dict[str, Tensor], like: Adapter | None, folder: Path) -> Stored:
    """Checks a new configuration and new tensors as a file's are checked."""
    parsed = LoraConfig.from_peft(config, str(folder))
    return Stored(config, tensors, peft_format.decode(parsed, tensors, like.base if like else None, folder))


# --- One rank, one scale ----------------------------------------------------------------------------------------------


def _compressed(found: Stored, rank: int, folder: Path) -> tuple[Stored, dict[str, float]]:
    adapter = found.adapter
    _refuse_beyond_matrices(adapter, folder, "--rank")
    smaller, kept = compress(adapter, rank)
    r, scale, pairs = _uniform(smaller)
    tensors: dict[str, Tensor] = {}
    for key, old in found.tensors.items():
        path, part = peft_format._split(key)
        assert part in ("A", "B")  # nothing else passed the refusals above
        new = pairs[path][part == "B"].to(old.dtype)
        tensors[key] = new.reshape(*new.shape, *old.shape[2:]) if part == "B" else new
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    return _stored({**found.config, "r": r, "lora_alpha": _alpha(scale, r), **plain}, tensors, adapter, folder), kept


def _uniform(adapter: Adapter) -> tuple[int, float, dict[str, tuple[Tensor, Tensor]]]:
    """Returns (rank, scale, (A, B) by path) with one rank and one scale for all: exact but for rounding once.

    The rank is the largest, reached with zeros; the scale the most frequent, other sites have theirs folded into B.
    """
    rank = max(factor.rank for factor in adapter.factors.values())
    scale = Counter(factor.scale for factor in adapter.factors.values()).most_common(1)[0][0]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, factor in adapter.factors.items():
        A, B = factor.A.detach(), factor.B.detach()
        if factor.scale != scale:
            B = (B.double() * (factor.scale / scale)).to(B.dtype)
        missing = rank - factor.rank
        pairs[path] = F.pad(A, (0, 0) * (A.ndim - 1) + (0, missing)), F.pad(B, (0, missing))
    return rank, scale, pairs


def _alpha(scale: float, rank: int) -> float:
    """Returns lora_alpha = s r, as a whole number where it is one but for rounding: a scale was alpha / r before."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _refuse_beyond_matrices(adapter: Adapter, folder: Path, what: str) -> None:
    factors = adapter.factors.items()
    reasons = {
        "a DoRA magnitude": [path for path, each in factors if each.magnitude is not None],
        "a bias of B (lora_bias)": [path for path, each in factors if each.bias is not None],
        "the factors of stacked experts": [p for p, each in factors if stored.is_stacked(adapter.config, p, each)],
        "the factor of a grouped convolution": [path for path, each in factors if each.groups > 1],
        "a trained bias, module or token row": list(adapter.loose),
    }
    for reason, paths in reasons.items():
        if paths:
            raise AdapterError(f"{folder}: {paths[0]} is {reason}, which {what} cannot hold. Nothing was written.")
    if not adapter.factors:
        raise AdapterError(f"{folder} has no factors; there is nothing to convert.")


# --- The formats ------------------------------------------------------------------------------------------------------


def _as_peft(found: Stored, source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return found.config, found.tensors


def _as_mlx(found: Stored, source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns mlx-lm's configuration and tensors; raises AdapterError for what it has no place or no name for."""
    adapter = found.adapter
    _refuse_beyond_matrices(adapter, source, "mlx-lm")
    keys: set[str] = set()
    for path, factor in adapter.factors.items():
        matched = _MLX_PATH.fullmatch(path)
        if matched is None or factor.A.ndim != 2:
            raise AdapterError(
                f"{source}: mlx-lm's name for {path} is not known; known are model.layers.N..., model.embed_tokens "
                "and lm_head. Nothing was written."
            )
        keys.add(matched["key"] or path)
    rank, scale, pairs = _uniform(adapter)
    stored_as = {peft_format._split(key)[0]: tensor.dtype for key, tensor in found.tensors.items()}
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in pairs.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = A.T.to(stored_as[path]), B.T.to(stored_as[path])
    parameters = {"rank": rank, "scale": scale, "dropout": adapter.config.lora_dropout, "keys": sorted(keys)}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}  # -1: all layers
    return config | {"model": adapter.config.base_model_name_or_path}, tensors


def _read_mlx(folder: Path) -> Stored:
    file = folder / peft_format.CONFIG
    config = _mlx_config(file)
    tensors, metadata = _mlx_tensors(folder / MLX_WEIGHTS)
    rank, scale = config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]
    paths = sorted({key.rpartition(".")[0] for key in tensors})
    for path in paths:
        a, b = (tensors.get(f"{path}.{half}") for half in ("lora_a", "lora_b"))
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0]) != (rank, rank):
            shapes = [None if half is None else tuple(half.shape) for half in (a, b)]
            raise AdapterError(
                f"{folder}: {path} has lora_a {shapes[0]} and lora_b {shapes[1]}; expected (inputs, {rank}) and "
                f"({rank}, outputs), as lora_parameters.rank says."
            )
    named = {"peft_type": "LORA", "r": rank, "lora_alpha": _alpha(scale, rank)}
    named |= {"lora_dropout": float(config["lora_parameters"].get("dropout", 0.0)), "target_modules": paths}
    values = LoraConfig.from_peft({**named, "base_model_name_or_path": config.get("model")}, str(file))
    as_peft = {_peft_key(*key.rpartition(".")[::2]): tensor.T.contiguous() for key, tensor in tensors.items()}
    base = peft_format._read_fingerprint(metadata, folder / MLX_WEIGHTS)
    found = _stored(values.to_peft(paths, fan_in_fan_out=False), as_peft, None, folder)
    return replace(found, adapter=replace(found.adapter, base=base))


def _peft_key(path: str, half: str) -> str:
    letter, embedding = half[-1].upper(), path.rpartition(".")[2] in _EMBEDDINGS
    return f"{_PREFIX}{path}." + (f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight")


def _mlx_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
        kind, parameters = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        rank, scale = parameters["rank"], parameters["scale"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{file} is not mlx-lm's: lora_parameters with rank and scale expected ({error})."
        ) from error
    if kind != "lora":
        raise AdapterError(f"{file}: fine_tune_type is {kind!r}; only 'lora' can be converted.")
    if not isinstance(rank, int) or rank < 1 or not isinstance(scale, int | float) or scale <= 0:
        raise AdapterError(f"{file}: rank is {rank!r} and scale {scale!r}; expected numbers above 0.")
    return config


def _mlx_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = peft_format.load_tensors(file)
    for name, tensor in tensors.items():
        if not name.endswith((".lora_a", ".lora_b")):
            raise AdapterError(f"{file}: {name} is neither a lora_a nor a lora_b; it cannot be converted.")
        peft_format.check_tensor(_peft_key(*name.rpartition(".")[::2]), tensor, file)
    if not tensors:
        raise AdapterError(f"{file} holds no tensors; this is not an adapter.")
    return tensors, metadata


def _write(folder: Path, to: str, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter) -> None:
    writers: dict[str, Callable[[], None]] = {
        "peft": lambda: peft_format.write_into(folder, config, tensors, adapter.base),
        "mlx": lambda: _write_mlx(folder, config, tensors, adapter),
    }
    writers[to]()


def _write_mlx(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter) -> None:
    base = {} if adapter.base is None else {"loratune": json.dumps({"base": adapter.base.to_json()}, sort_keys=True)}
    files.write_json(folder / peft_format.CONFIG, config)
    save_file(tensors, str(folder / MLX_WEIGHTS), {"format": "mlx", **base})
