"""GGUF files as base models: read, dequantised once into a transformers folder, kept in a cache.

transformers reads these files too, but through a reader that makes a numpy object of every vocabulary entry, three
times over (11 s each for the 262,144 tokens of Gemma 3), needs `accelerate`, and ignores metadata that it does not
know. Here the file is read with `struct` (0.7 s), every key and tensor is accounted for, and the result is a plain
folder. The values are those of transformers' own path, bit for bit.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from loratune.errors import ConfigError
from loratune.files import digest, free_bytes, make_directory, remove_directory, staged_directory, write_json
from loratune.model.gguf_file import Array, File, read

Notify = Callable[[str], None]

FORMAT = 1  # of a conversion: raise it when the same GGUF would convert differently, so that old ones are made again
MANIFEST = "MANIFEST.json"
TOKENIZER_BYTES = 64 << 20  # more than the 33 MB that Gemma 3's 262,144 tokens take as tokenizer.json

# ---- architectures --------------------------------------------------------------------------------------------------


class Keys:
    """The metadata of one architecture, without its prefix, that remembers what was read.

    A key that nobody read may change what the model computes, so `finish` refuses it.
    """

    def __init__(self, file: File) -> None:
        prefix = file.metadata["general.architecture"] + "."
        self.file = file
        self.rest = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}

    def need(self, key: str) -> Any:
        if key not in self.rest:
            raise ConfigError(f"{self.file.path} does not state {key}. Convert it again with a current llama.cpp.")
        return self.rest.pop(key)

    def get(self, key: str, default: Any) -> Any:
        return self.rest.pop(key, default)

    def expect(self, key: str, value: Any) -> None:
        found = self.rest.pop(key, value)
        if found != value:
            raise ConfigError(
                f"{self.file.path} states {key} = {found!r}; only {value!r} can be converted. Use the original folder."
            )

    def finish(self) -> None:
        if self.rest:
            raise ConfigError(
                f"{self.file.path} states {', '.join(sorted(self.rest))}, which this conversion does not know, so the "
                "model could compute something else. Use the original folder or hub id."
            )


def _decoder(keys: Keys) -> dict[str, Any]:
    """What all decoders state in one way."""
    hidden, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    head_dim = keys.get("attention.key_length", hidden // heads)
    keys.expect("attention.value_length", head_dim)
    keys.expect("rope.dimension_count", head_dim)  # another value is a partial rotation
    keys.get("vocab_size", None)  # the rows of the embedding are what counts
    return {
        "hidden_size": hidden,
        "num_hidden_layers": keys.need("block_count"),
        "intermediate_size": keys.need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys),
    }


def _rope(keys: Keys) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10_000.0)}
    if keys.get("rope.scaling.type", "none") == "linear":
        rope |= {"rope_type": "linear", "factor": keys.need("rope.scaling.factor")}
    return rope  # other scalings leave their keys unread


def _llama(keys: Keys) -> dict[str, Any]:
    """Llama 1 to 3 and Mistral. Llama 3's rotary scaling is not in the metadata but a tensor of factors."""
    config = _decoder(keys)
    if factors := keys.file.tensors.get("rope_freqs.weight"):
        config["rope_parameters"] |= _llama3_rope(keys.file, factors.values(), config)
    return config


def _llama3_rope(file: File, factors: Array, config: dict[str, Any]) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, proved by recomputing the file's factors from it.

    Source: `rope_type` llama3 of transformers, and the converter of llama.cpp.
    """
    rope = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = context = 8192
    theta, head_dim = config["rope_parameters"]["rope_theta"], config["head_dim"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ConfigError(
            f"{file.path} scales its rotary frequencies in a way that is not Llama 3's (tensor rope_freqs.weight). "
            "Use the original folder or hub id."
        )
    return rope | {"rope_type": "llama3"}


def _gemma3(keys: Keys) -> dict[str, Any]:
    config = _decoder(keys)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    # Every size scales attention by its head size, but the 27B one (62 blocks) by hidden / heads: llama.cpp, gemma3.
    config["query_pre_attn_scalar"] = hidden // heads if config["num_hidden_layers"] == 62 else config["head_dim"]
    config["sliding_window"] = keys.need("attention.sliding_window")
    local = {"rope_type": "default", "rope_theta": 10_000.0}
    return config | {"rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local}}


def _unpermuted(name: str, values: Array, config: PreTrainedConfig) -> Array:
    """Undoes llama.cpp's interleaving of the two rotary halves in each query and key head."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _without_one(name: str, values: Array, config: PreTrainedConfig) -> Array:
    """Gemma's norms multiply by 1 + w; llama.cpp stores the sum."""
    return values - 1 if name.endswith("norm.weight") else values


def _as_stored(name: str, values: Array, config: PreTrainedConfig) -> Array:
    return values


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture becomes a transformers model."""

    model_type: str
    config: Callable[[Keys], dict[str, Any]]
    restore: Callable[[str, Array, PreTrainedConfig], Array]
    consumed: frozenset[str] = frozenset()  # tensors that `config` has read


ARCHITECTURES = {
    "llama": Architecture("llama", _llama, _unpermuted, frozenset({"rope_freqs.weight"})),
    "qwen2": Architecture("qwen2", _decoder, _as_stored),
    "qwen3": Architecture("qwen3", _decoder, _as_stored),
    "gemma3": Architecture("gemma3_text", _gemma3, _without_one),
}
_TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def _architecture(file: File) -> tuple[str, Architecture]:
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path} holds a model of the architecture {name!r}; from GGUF, {', '.join(ARCHITECTURES)} can be "
            "converted. Use the model's folder or hub id."
        )
    return name, ARCHITECTURES[name]


# ---- conversion -----------------------------------------------------------------------------------------------------


def convert(path: Path, folder: Path) -> None:
    """Writes what `from_pretrained` needs of a GGUF file into `folder`: config, weights, tokenizer.

    Quantised weights become float32, without rounding; F16 and BF16 files keep their type. Raises ConfigError
    for a file, architecture, key or tensor that cannot be carried over exactly, and when the disk is too small.
    """
    file = read(path)
    name, architecture = _architecture(file)
    config = _config(file, architecture)
    num_elements = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    require_space(folder, num_elements * file.dtype.itemsize + TOKENIZER_BYTES)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=file.dtype)
    config.architectures = [type(model).__name__]
    weights = _weights(file, name, architecture, model)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _tokenizer(path).save_pretrained(folder)


def _config(file: File, architecture: Architecture) -> PreTrainedConfig:
    keys = Keys(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{file.path} has no tensor token_embd.weight. Download or convert it again.")
    values = {field: file.metadata.get(f"tokenizer.ggml.{key}") for field, key in _TOKEN_IDS.items()}
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    try:
        values |= architecture.config(keys)
        config = AutoConfig.for_model(
            architecture.model_type, **values, vocab_size=embedding.shape[0], dtype=file.dtype
        )
    except (TypeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError(f"{file.path} states impossible settings: {error}. Download or convert it again.") from error
    keys.finish()
    return config


def _weights(file: File, name: str, architecture: Architecture, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors from the file's: each wanted one found, each stored one used, each of the right shape."""
    config: Any = model.config
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    sources = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) or key for key in wanted}
    _account(file, set(sources.values()) | architecture.consumed, architecture.consumed)
    weights: dict[str, torch.Tensor] = {}
    for key, source in sources.items():
        stored = file.tensors[source]
        if stored.shape != tuple(wanted[key]):
            raise ConfigError(f"{file.path}: {source} is {stored.shape}, but {key} needs {tuple(wanted[key])}.")
        values = architecture.restore(source, stored.values(), config)
        weights[key] = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(file.dtype)
    return weights


def _account(file: File, known: Iterable[str], optional: Iterable[str]) -> None:
    stored = set(file.tensors)
    missing, unused = set(known) - stored - set(optional), stored - set(known)
    for what, names in (("lacks", missing), ("holds, and this model cannot place,", unused)):
        if names:
            raise ConfigError(
                f"{file.path} {what} {len(names)} tensors; first: {min(names)}. Use another file, or the model's "
                "folder or hub id."
            )


def portable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Takes out what describes this load, so that a saved tokenizer_config.json does not repeat it elsewhere."""
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = TokenizersBackend.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # `tokenizers` raises nothing more exact
        raise ConfigError(f"{path} holds no tokenizer that can be built: {error}. Use the model's folder.") from error
    portable(tokenizer)
    return tokenizer


# ---- the cache ------------------------------------------------------------------------------------------------------


def cache_root() -> Path:
    """Returns $LORATUNE_CACHE, else loratune in $XDG_CACHE_HOME or $HF_HOME, else ~/.cache/loratune."""
    if own := os.environ.get("LORATUNE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("HF_HOME") or "~/.cache"
    return Path(base).expanduser() / "loratune"


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises ConfigError when the disk of `folder` has less than `num_bytes` free."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise ConfigError(
            f"the model needs {num_bytes:,} bytes in the cache {cache_root()}, {free:,} are free. "
            "Make room, or set LORATUNE_CACHE to a folder on a larger disk."
        )


def converted(path: Path, notify: Notify | None = None) -> Path:
    """Returns the folder that holds a GGUF file as a transformers model, converting it the first time.

    The folder is keyed by the file's sha256. Raises ConfigError as `convert` does, and for a cache that
    cannot be written.
    """
    if not path.is_file():
        raise ConfigError(f"there is no GGUF file {path}.")
    return cached(digest(path), path.name, lambda folder: convert(path, folder), notify)


def cached(key: str, name: str, build: Callable[[Path], None], notify: Notify | None = None) -> Path:
    """Returns the cache's folder for `key`, filled by `build` unless a complete one is there.

    It is built aside and renamed; a second process waits for the first. A folder that lost a file is built again.
    """
    root = cache_root()
    folder = root / "gguf" / key
    if is_complete(folder, key):
        return folder
    try:
        make_directory(folder.parent)
    except ConfigError as error:
        raise _unwritable(root, error.__cause__) from error
    try:
        with FileLock(folder.with_suffix(".lock")):
            if not is_complete(folder, key):
                if notify is not None:
                    notify(f"converting {name} once, into {folder}; later starts take seconds")
                _fill(folder, key, name, build)
    except (OSError, SafetensorError) as error:
        raise _unwritable(root, error) from error
    return folder


def _unwritable(root: Path, error: BaseException | None) -> ConfigError:
    return ConfigError(
        f"cannot write the model cache {root}: {error}. "
        "Set LORATUNE_CACHE to a folder that can be written and has room, or pass a model folder with --model."
    )


def _fill(folder: Path, key: str, name: str, build: Callable[[Path], None]) -> None:
    for abandoned in folder.parent.glob(f".{key}.*"):  # a process that was killed; the lock says that none is at work
        remove_directory(abandoned)
    with staged_directory(folder, replace=True) as staging:
        build(staging)
        sizes = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
        write_json(staging / MANIFEST, {"format": FORMAT, "source": name, "sha256": key, "files": sizes})


def is_complete(folder: Path, key: str) -> bool:
    """Whether `folder` is a whole conversion of `key`, made in the current format: every file at its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["sha256"]) != (FORMAT, key):
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
