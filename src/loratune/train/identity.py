"""What must be the same for a resumed run to be the same run: base, data, tokenizer, settings, machine's arithmetic."""

import hashlib
import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from loratune.adapter.attach import Attached
from loratune.adapter.fingerprint import fingerprint
from loratune.data.dataset import Dataset
from loratune.data.deferred import tokenizer_digest
from loratune.errors import CheckpointError
from loratune.model.images import Images
from loratune.train.checkpoint import Checkpoint
from loratune.train.config import RunConfig


def identity(
    attached: Attached, tokenizer: PreTrainedTokenizerBase, config: RunConfig, training: Dataset, validation: Dataset
) -> dict[str, Any]:
    """Returns what must be the same for a resumed run to be the same run."""
    base = attached.adapter.base or fingerprint(attached.model)
    parameter = next(attached.model.parameters())
    schedule = config.train.model_dump(exclude={"keep", "save_every", "patience"})
    return {
        "base_model": _digest(json.dumps(base.to_json(), sort_keys=True)),
        "data": {"train": training.digest, "validation": validation.digest},
        "rows": config.data.model_dump(include={"format", "columns", "train_on", "long"}),
        "tokenizer": _tokenizer_digest(tokenizer),
        "adapter": config.adapter.model_dump(mode="json"),
        "train": schedule,
        "precision": str(parameter.dtype),
        "machine": _machine(parameter.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "loratune": version("loratune"), "torch": torch.__version__, "transformers": transformers.__version__,
        },
    }  # fmt: skip


def _machine(device: torch.device) -> str:
    """Returns what chooses the kernels: the GPU's name, or the processor's kind and vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    if isinstance(tokenizer, Images):
        return _digest(json.dumps(tokenizer.settings, sort_keys=True))
    return tokenizer_digest(tokenizer)


def check(saved: Checkpoint, now: dict[str, Any], *, allow: bool = False) -> list[str]:
    """Returns what has changed since a checkpoint was taken; without `allow`, anything is a CheckpointError."""
    changed = list(_changes(saved.state.get("identity", {}), json.loads(json.dumps(now))))
    if changed and not allow:
        raise CheckpointError(
            f"{saved.path} was not made by this run as it is now, and would not continue it: {'; '.join(changed)}. "
            "Put these back, start a new run, or go on with --allow-changed: the run is then labelled as not identical."
        )
    return changed


def _changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yields "path was X, is Y" for every value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _changes(before.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif before != now:
        yield f"{path} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
