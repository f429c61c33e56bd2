"""A base model's tokenizer that is read when something of it is asked for, and until then is known by its files.

Reading Gemma's takes longer than anything else before a run's first step, and a run whose tokens are stored needs of it
by then only to know that it is the same. So what a tokenizer is, once read and checked, is noted in the cache under the
digest of its folder's files and of the versions that read them; where a note is found, reading waits.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from loratune import files
from loratune.errors import ConfigError

_LARGEST_BYTES = 1 << 27  # no tokenizer's file is larger; Gemma's has 33 MB


class Deferred:
    """Stands for the tokenizer in a folder; anything but what was noted reads it, which may raise what `read` raises.

    Raises ConfigError if what is read then is not what was noted.
    """

    def __init__(self, read: Callable[[], Any], folder: Path, digest: str, special_tokens_map: dict[str, str]) -> None:
        self._read, self._folder, self._lock = read, folder, Lock()
        self._tokenizer: Any = None
        self.digest, self.special_tokens_map = digest, special_tokens_map

    def read(self) -> Any:
        """Returns the tokenizer itself."""
        with self._lock:
            if self._tokenizer is None:
                tokenizer = self._read()
                if (found := tokenizer_digest(tokenizer)) != self.digest:
                    raise ConfigError(
                        f"the tokenizer in {self._folder} is another than the one this run began with (its digest was "
                        f"{self.digest[:12]}, is {found[:12]}): its files were changed meanwhile. Put them back."
                    )
                self._tokenizer = tokenizer
        return self._tokenizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.read()(*args, **kwargs)

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.read())


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns the sha256 of what a tokenizer does: its vocabulary and rules, and its chat template."""
    if isinstance(tokenizer, Deferred):
        return tokenizer.digest
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256((content + str(tokenizer.chat_template)).encode()).hexdigest()


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Returns the names of a tokenizer's special tokens and what they are."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items()}


def deferred(folder: Path, cache: Path, read: Callable[[], Any]) -> Deferred | None:
    """Returns what stands for a folder's tokenizer, if it was read from the same files before and noted."""
    try:
        noted = json.loads(_note_of(folder, cache).read_text("utf-8"))
        return Deferred(read, folder, noted["digest"], noted["special_tokens_map"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never noted, or not to be read: the tokenizer itself is


def note(folder: Path, cache: Path, tokenizer: Any) -> None:
    """Notes what was read from a folder, and passed every check; a cache that cannot be written costs time only."""
    noted = {"digest": tokenizer_digest(tokenizer), "special_tokens_map": special_tokens(tokenizer)}
    with suppress(OSError, ConfigError):
        path = _note_of(folder, cache)
        files.make_directory(path.parent)
        files.write_json(path, noted)


def _note_of(folder: Path, cache: Path) -> Path:
    """Every file but large weights counts: which of them a tokenizer is made of is transformers' to say."""
    paths = sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")])
    small = [path for path in paths if path.is_file() and path.stat().st_size <= _LARGEST_BYTES]
    given = [(str(path.relative_to(folder)), files.digest(path)) for path in small]
    key = [given, *map(version, ("loratune", "tokenizers", "transformers"))]
    return cache / "tokenizers" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
