"""loratune fine-tunes transformer models with LoRA: exact, fast, and nothing fails silently.

The public names, resolved when they are first used (PEP 562), so that `import loratune` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratune.adapter.adapter import Adapter
    from loratune.adapter.arithmetic import combine, compress, rescale, subtract
    from loratune.adapter.attach import Attached, attach, attached_to, load_adapter
    from loratune.adapter.config import LoraConfig
    from loratune.adapter.eva import eva
    from loratune.adapter.factor import LowRank
    from loratune.adapter.peft_format import read as read_adapter
    from loratune.api import adapter_info, export_merged, resume, run, train
    from loratune.errors import LoratuneError
    from loratune.model.load import load_model, load_tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter.adapter",
    "Attached": "adapter.attach",
    "LoraConfig": "adapter.config",
    "LoratuneError": "errors",
    "LowRank": "adapter.factor",
    "adapter_info": "api",
    "attach": "adapter.attach",
    "attached_to": "adapter.attach",
    "combine": "adapter.arithmetic",
    "compress": "adapter.arithmetic",
    "eva": "adapter.eva",
    "export_merged": "api",
    "load_adapter": "adapter.attach",
    "load_model": "model.load",
    "load_tokenizer": "model.load",
    "read_adapter": "adapter.peft_format",
    "rescale": "adapter.arithmetic",
    "resume": "api",
    "run": "api",
    "subtract": "adapter.arithmetic",
    "train": "api",
}
_RENAMED = {"read_adapter": "read"}

__all__ = [  # noqa: RUF022  # in the order a reader meets them
    "load_model", "load_tokenizer", "LoraConfig", "attach", "attached_to", "load_adapter", "train", "run", "resume",
    "export_merged", "adapter_info", "read_adapter", "combine", "subtract", "rescale", "compress", "eva",
    "Adapter", "Attached", "LowRank", "LoratuneError", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loratune' has no attribute {name!r}")
    return getattr(import_module(f"loratune.{_HOMES[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
