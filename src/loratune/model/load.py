"""From a name to a frozen base model and its tokenizer: folder, GGUF file, hub cache, embedded package, hub."""

import difflib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from loratune.data.deferred import deferred, note
from loratune.errors import ConfigError
from loratune.model import embedded, gguf, heads, narrow
from loratune.model.images import Images

Notify = Callable[[str], None]

TASKS = {"CAUSAL_LM": AutoModelForCausalLM}  # whose adapters are merged file by file
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",  # as stored
    "stored": "stored",  # in memory; on a CPU computed with as float32: see model.narrow
}
# Gemma 3 text models share the tokenizer of the multimodal ones, with one token that their embedding has no row for.
SURPLUS_TOKENS = frozenset({"<image_soft_token>"})
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # never pickles, which are programs
_NOTHING_RUN = {"local_files_only": True, "trust_remote_code": False}  # None would ask, in the middle of a run
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Source:
    """Where a base model was found: `path` is the folder that is loaded, `name` what an adapter records as its base."""

    kind: str  # folder, gguf, hub cache, embedded, hub
    path: Path
    name: str
    digest: str | None = None  # sha256 of the GGUF file that the folder was made from


# ---- finding --------------------------------------------------------------------------------------------------------


class _Search:
    """One name, and what has been tried for it; each method is one place to look, None when it is not there."""

    def __init__(self, name: str, notify: Notify | None) -> None:
        self.name, self.notify = name, notify
        self.path = Path(name).expanduser()
        self.tried: list[str] = []

    def folder(self) -> Source | None:
        if not self.path.is_dir():
            self.tried.append("there is no such folder or file")
            return None
        if not (self.path / "config.json").is_file():
            files = sorted(self.path.glob("*.gguf"))
            hint = f"It holds a GGUF file: give {files[0]}." if files else "Give the folder that save_pretrained wrote."
            raise ConfigError(f"the folder {self.path} holds no config.json, so it is not a model. {hint}")
        return Source("folder", self.path, str(self.path))

    def file(self) -> Source | None:
        if not self.path.is_file():
            return None
        if self.path.suffix.lower() != ".gguf":
            raise ConfigError(f"the model {self.path} is a file; expected a folder with config.json, or a .gguf file.")
        folder = gguf.converted(self.path, self.notify)
        return Source("gguf", folder, str(folder), folder.name)

    def hub_cache(self) -> Source | None:
        if not self._is_hub_id():
            return None
        try:
            folder = Path(snapshot_download(self.name, local_files_only=True))
        except OSError:  # LocalEntryNotFoundError: the cache does not know it
            folder = None
        if folder is None or not _is_whole(folder):
            self.tried.append("the hub cache does not hold it whole")
            return None
        return Source("hub cache", folder, self.name)

    def embedded(self) -> Source | None:
        entry = embedded.EMBEDDED.get(self.name)
        if entry is None:
            self.tried.append(f"no package carries it (known: {', '.join(embedded.EMBEDDED)})")
            return None
        if not embedded.is_installed(entry):
            self.tried.append(f"its package is not installed ({embedded.INSTALL}, or choose another --model)")
            return None
        if self.notify is not None:
            self.notify(f"{entry.name}: using {entry.description}")
        return Source("embedded", embedded.folder(entry, self.notify), entry.name, entry.sha256)

    def hub(self) -> Source | None:
        if not self._is_hub_id():
            return None
        if is_offline_mode():
            self.tried.append("the hub was not asked (HF_HUB_OFFLINE is set)")
            return None
        try:
            folder = Path(snapshot_download(self.name, allow_patterns=_DOWNLOADED))
        except (OSError, HfHubHTTPError) as error:
            self.tried.append(f"the hub cannot give it: {_first_line(error)}")
            return None
        if not _is_whole(folder):
            raise ConfigError(f"{self.name} on the hub holds no config.json with safetensors weights. Choose another.")
        return Source("hub", folder, self.name)

    def _is_hub_id(self) -> bool:
        try:
            validate_repo_id(self.name)
        except HFValidationError:
            return False
        return not self.name.endswith(".gguf")

    def nothing(self) -> ConfigError:
        nearest = difflib.get_close_matches(self.name, [*self._neighbours(), *embedded.EMBEDDED], n=3)
        hint = f"Nearest: {', '.join(nearest)}." if nearest else "Give a model folder, a .gguf file or a hub id."
        return ConfigError(f"cannot find the model {self.name!r}: {'; '.join(self.tried)}. {hint}")

    def _neighbours(self) -> list[str]:
        parent = self.path.parent
        if not parent.is_dir():
            return []
        return [
            str(entry) for entry in parent.iterdir() if entry.suffix == ".gguf" or (entry / "config.json").is_file()
        ]


def resolve(name: str | Path, notify: Notify | None = None) -> Source:
    """Finds a base model: a folder, a GGUF file, the hub's cache, an installed package, the hub, in this order.

    A GGUF file is converted once into the cache; the hub is not asked when HF_HUB_OFFLINE is set. `notify` gets a
    line when an embedded copy is used and when something is converted. Raises ConfigError that lists what was
    tried and the nearest names.
    """
    search = _Search(str(name), notify)
    for look in (search.folder, search.file, search.hub_cache, search.embedded, search.hub):
        if (source := look()) is not None:
            return source
    raise search.nothing()


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has a config and all its weights: an interrupted download has not."""
    if not (folder / "config.json").is_file():
        return False
    for index in _INDEXES:
        if (folder / index).is_file():
            shards: dict[str, str] = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
            return all((folder / shard).is_file() for shard in set(shards.values()))
    return any((folder / name).is_file() for name in _WEIGHTS)


# ---- loading --------------------------------------------------------------------------------------------------------


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    task_type: str = "CAUSAL_LM",
    labels: Sequence[str] = (),
    problem: str | None = None,
    notify: Notify | None = None,
    defer: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a base model, frozen and in eval mode, with its tokenizer, or, where it reads images, its `Images`.

    `labels` are the classes of a task's head, in order, and `problem` is transformers' problem_type; a head that the
    weights lack is zero until `heads.begin`.
    `device` is cuda where there is one, else cpu; `dtype` is the stored type, but float32 on a CPU, where
    bfloat16 arithmetic is mostly slower. "stored" computes the same there, with weights of half the memory.
    `model.name_or_path` is what PEFT and transformers can load again. With `defer`, a tokenizer that was loaded before
    from the same files is a `Deferred`, read when it is first used.
    Raises ConfigError for an unknown model, task or type, for missing, damaged or non-finite weights, and for
    a tokenizer with more tokens than the embedding has rows.
    """
    task = _known("task_type", task_type, TASKS | heads.CLASSES)
    place = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(dtype, place)
    source = resolve(name, notify)
    images = Images.of(source.path) if task_type in heads.IMAGES else None
    read, defer = partial(tokenizer_of, source), defer and task_type == "CAUSAL_LM"
    later = deferred(source.path, gguf.cache_root(), read) if defer else None
    tokenizer: Any = images or later or read()
    model = _weights(task, source, dtype, notify, heads.settings(source.path, task_type, labels, problem))
    check_finite(model)
    if images is None and later is None:
        heads.complete(model, tokenizer, task_type)
        check_vocabulary(model, tokenizer)
        if defer:
            note(source.path, gguf.cache_root(), tokenizer)
    model.name_or_path = model.config._name_or_path = source.name
    try:
        model.to(place)  # pyright: ignore[reportArgumentType]  # transformers decorates `to`
    except RuntimeError as error:
        raise ConfigError(f"cannot put {source.name} on {place}: {_first_line(error)}") from error
    model.eval().requires_grad_(False)
    return narrow.narrow(model) if dtype == "stored" else model, tokenizer


def load_tokenizer(name: str | Path, *, notify: Notify | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model alone; finds it and raises as `load_model` does."""
    return tokenizer_of(resolve(name, notify))


def _known(what: str, value: str, table: dict[str, Any]) -> Any:
    if value not in table:
        nearest = difflib.get_close_matches(value, table, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(f"{what} {value!r} is not known; expected one of {', '.join(table)}.{hint}")
    return table[value]


def _device(wish: str) -> torch.device:
    try:
        device = torch.device(wish)
    except RuntimeError as error:
        raise ConfigError(f"the device {wish!r} is not known; expected cpu, cuda, cuda:1, mps or another.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {wish!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices. Use cpu."
        )
    return device


def _dtype(wish: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if wish is None or (wish == "stored" and device.type != "cpu"):
        return torch.float32 if device.type == "cpu" else "auto"
    return wish if isinstance(wish, torch.dtype) else _known("dtype", wish, DTYPES)


def _check_family(task: Any, config: Any) -> None:
    """Raises ConfigError where transformers has no model of this family for a task, and says for which it has one."""
    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        return  # what is wrong with it, `from_pretrained` says
    able = {name for name, auto in (TASKS | heads.CLASSES).items() if CONFIG_MAPPING[family] in auto._model_mapping}
    wished = next(name for name, auto in (TASKS | heads.CLASSES).items() if auto is task)
    if able and wished not in able:
        raise ConfigError(
            f"transformers has no {wished} model of the family {family}; it has {', '.join(sorted(able))}. "
            "Take one of these tasks, or a model of another family."
        )


def _weights(
    task: Any, source: Source, dtype: str | torch.dtype, notify: Notify | None, settings: dict[str, Any]
) -> PreTrainedModel:
    _check_family(task, _safe_config(source.path))
    is_narrow = dtype == "stored"
    dtype = torch.float32 if is_narrow else dtype
    try:
        with no_progress_bar(), narrow.as_stored() if is_narrow else nullcontext():
            model, report = task.from_pretrained(
                source.path, dtype=dtype, output_loading_info=True, use_safetensors=True, **_NOTHING_RUN, **settings
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot load the model in {source.path}: {_first_line(error)}") from error
    kind = type(model).__name__
    if missing := heads.emptied(model, report, settings, source.path):  # filled with random numbers
        raise ConfigError(
            f"the weights in {source.path} lack {len(missing)} tensors of {kind}; first: {min(missing)}. "
            "Use a complete copy, made for this task."
        )
    if (unused := report["unexpected_keys"]) and notify is not None:
        notify(f"{source.name}: {len(unused)} stored tensors are not part of {kind}; first: {min(unused)}")
    return model


def _safe_config(folder: Path) -> Any:
    """Returns config.json; raises ConfigError for weights in pickles, and where it names a kernel to be fetched."""
    safe, pickles = zip(_WEIGHTS, _INDEXES, strict=True)
    if any((folder / name).is_file() for name in pickles) and not any((folder / name).is_file() for name in safe):
        raise ConfigError(
            f"{folder} holds its weights in a pickle, {pickles[0]}, which can run code and is not read. Load the model "
            "once where you trust it, and save it with save_pretrained."
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'} is not JSON: {error}.") from error
    for key, value in _entries(config):
        if key.endswith(("_implementation", "_implementation_internal")) and "/" in str(value):
            raise ConfigError(f"{folder / 'config.json'}: {key} is {value!r}: code to be fetched and run. Remove it.")
    return config


def _entries(value: Any) -> Generator[tuple[str, Any]]:
    """Yields every (key, value) of an object and of those in it."""
    for key, each in value.items() if isinstance(value, dict) else ():
        yield key, each
        yield from _entries(each)


@contextmanager
def no_progress_bar() -> Generator[None]:
    """Loading local weights takes seconds, and transformers draws a bar for it over whatever the terminal shows, and a
    table of the tensors that are missing or unused, which are judged here."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a source; raises ConfigError for a folder without one, or one that cannot be read."""
    if not any((source.path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(  # transformers would make an empty tokenizer instead
            f"{source.path} holds no tokenizer (looked for {', '.join(_TOKENIZER_FILES)}). "
            "Copy the tokenizer's files beside the weights."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **_NOTHING_RUN)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"cannot load the tokenizer in {source.path}: {_first_line(error)}") from error
    tokenizer.name_or_path = source.name
    gguf.portable(tokenizer)
    return tokenizer


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_finite(model: torch.nn.Module) -> None:
    """Raises ConfigError that names the first weight with NaN or infinity.

    A sum in float32 is finite only if all its terms are, and costs one pass; a sum that overflows is looked at closely.
    """
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight.sum(dtype=torch.float32)):
            _refuse(name, weight)


def _refuse(name: str, weight: torch.Tensor) -> None:
    num_bad = int((~torch.isfinite(weight)).sum())
    if num_bad:
        raise ConfigError(
            f"the base weight {name} holds {num_bad:,} values of {weight.numel():,} that are NaN or infinite. "
            "The file is damaged or was converted wrongly: get another copy."
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError when the tokenizer has ids that the embedding has no row for."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, torch.Tensor)
    rows = embedding.weight.shape[0]
    if len(tokenizer) <= rows:
        return
    surplus = {token for token, index in tokenizer.get_vocab().items() if index >= rows} - SURPLUS_TOKENS
    if surplus:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer):,} tokens, the embedding {rows:,} rows; without a row: "
            f"{_listed(surplus)}. Take the model's own tokenizer, or resize the embedding and save the model first."
        )


def _listed(names: Iterable[str], limit: int = 3) -> str:
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:limit])) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
