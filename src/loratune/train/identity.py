"""What must be the same for a resumed run to be the same run: base, data, tokenizer, settings, machine's arithmetic."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from loratune.adapter.attach import Attached
from loratune.adapter.fingerprint import fingerprint
from loratune.data.dataset import Dataset
from loratune.errors import CheckpointError
from loratune.train.checkpoint import Checkpoint
from loratune.train.config import RunConfig


def identity(
    attached: Attached, tokenizer: PreTrainedTokenizerBase, config: RunConfig, training: Dataset, validation: Dataset
) -> dict[str, Any]:
    """Returns what must be the same for a resumed run to be the same run."""
    base = attached.adapter.base or fingerprint(attached.model)
    schedule = config.train.model_dump(exclude={"keep", "save_every"})
    return {
        "base_model": _digest(json.dumps(base.to_json(), sort_keys=True)),
        "data": {"train": training.digest, "validation": validation.digest},
        "tokenizer": _tokenizer_digest(tokenizer),
        "adapter": config.adapter.model_dump(mode="json"),
        "train": schedule,
        "precision": str(next(attached.model.parameters()).dtype),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return _digest(content + str(tokenizer.chat_template))


def check(saved: Checkpoint, now: dict[str, Any]) -> None:
    """Raises CheckpointError that lists what has changed since a checkpoint was taken."""
    changed = list(_changes(saved.state["identity"], json.loads(json.dumps(now))))
    if changed:
        raise CheckpointError(
            f"{saved.path} was not made by this run as it is now, and would not continue it: {'; '.join(changed)}. "
            "Put these back, or start a new run."
        )


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
